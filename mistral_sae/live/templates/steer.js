// ---- steer: sliders, texts side by side as they come, a sweep, a conversation ----

// By method: the reach of a slider, its step, and the unit; any other strength can be typed
const REACH = {
  clamp: [4, 0.1, "× its maximum"], add: [1, 0.02, "norms"], raw: [20, 0.5, "rows"], ablate: [0, 1, "held at 0"],
};
const TITLES = { own: "Without steering", steered: "Steered", rival: "Difference of means" };

const field = (name) => document.querySelector(`#steer-form [name="${name}"]`);
const edits = () => [...document.querySelectorAll("#edits li")];

/** A slider for one more feature. */
function addEdit(feature, strength) {
  if (field(`f${feature}`) || state.position.get(feature) === undefined) return;
  const label = `Strength of feature ${feature}`, name = `f${feature}`;
  const number = h("input", { type: "number", step: "any", name, value: strength, required: true, "aria-label": label });
  const slider = h("input", { type: "range", "aria-label": `${label}, slider` });
  const remove = h("button", { type: "button", "aria-label": `Remove feature ${feature}` }, "✕");
  const line = h("li", { "data-feature": feature },
    h("span", { class: "what" }, linked(feature)), slider, number, h("span", { class: "unit" }), remove);
  slider.addEventListener("input", () => (number.value = slider.value));
  number.addEventListener("input", () => (slider.value = number.value));
  remove.addEventListener("click", () => {
    line.remove();
    drawEdits();
    keep();
  });
  $("edits").append(line);
  drawEdits();
}

/** Bring sliders, the command and what else shows the edit up to date. */
function drawEdits() {
  const [reach, step, unit] = REACH[field("method").value];
  for (const line of edits()) {
    const [slider, number] = line.querySelectorAll("input");
    for (const [name, value] of [["min", -reach], ["max", reach], ["step", step]]) slider[name] = value;
    slider.value = number.value;
    slider.hidden = number.hidden = reach === 0;
    line.querySelector(".unit").textContent = unit;
  }
  const { features, method } = currentEdit(), shown = Object.entries(features).map(([f, c]) => `${f} at ${c}`).join(", ");
  $("steered").textContent = edits().length || "";
  $("command").textContent = commandOf();
  $("chat-edit").replaceChildren(shown ? `Steered: ${method}, feature ${shown}. ` : "Not steered. ",
    h("a", { href: "#view=steer" }, "Change it"));
}

/** The edit, as the server and its API take it. */
function currentEdit() {
  const strengths = edits().map(({ dataset: { feature } }) => [feature, Number(field(`f${feature}`).value)]);
  return { features: Object.fromEntries(strengths), method: field("method").value, positions: field("positions").value };
}

const sampled = () => ({ temperature: Number(field("temperature").value), seed: Number(field("seed").value) });

/** The constants that make demo.py do the same. */
function commandOf() {
  const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`, { features, method, positions } = currentEdit();
  const named = Object.entries(features).map(([feature, strength]) => `${feature}: ${strength}`).join(", ");
  const edit = named ? [`FEATURE_INDEX=${quoted(`{${named}}`)}`, `METHOD=${method}`, `POSITIONS=${positions}`]
    : ["FEATURE_INDEX=0", "COEFFICIENT=1", "STEERING_ON=False"];
  const { temperature, seed } = sampled();
  return [state.index.demo, ...edit, `PROMPT=${quoted(field("prompt").value)}`, `NEW_TOKENS=${field("tokens").value}`,
    `TEMPERATURE=${temperature}`, `SEED=${seed}`].join(" ");
}

// ---- texts side by side ----

/** Run what can be stopped; the buttons that start something are off meanwhile. */
async function stoppable(status, work) {
  state.running?.abort();
  const running = (state.running = new AbortController());
  $("halt").hidden = false;
  await saying(status, () => work(running.signal));
  if (state.running === running) $("halt").hidden = true;
}

/** An element that a text grows in. */
const growing = () => h("div", { class: "passage", dir: "auto" });

async function writeTexts(signal) {
  const lines = (name) => field(name).value.split("\n").filter((line) => line.trim());
  const [toward, away] = [lines("toward"), lines("away")], stop = field("stop").value;
  const wanted = {
    prompt: field("prompt").value, steer: currentEdit(), max_tokens: Number(field("tokens").value), ...sampled(),
    stop: stop ? [stop] : [],
    ...(toward.length && away.length ? { rival: { toward, away, strength: Number(field("rival").value) } } : {}),
  };
  $("swept").replaceChildren();
  $("texts").replaceChildren();
  const shown = {};
  for await (const { pieces, texts, verdict } of stream("/texts", wanted, signal)) {
    for (const [name, piece] of Object.entries(pieces ?? {})) {
      if (!shown[name]) {
        shown[name] = growing();
        $("texts").append(h("section", { id: `text-${name}` }, h("h2", {}, TITLES[name]), shown[name]));
      }
      shown[name].append(...visible(piece, { breaks: true }));
    }
    for (const [name, text] of Object.entries(texts ?? {})) shown[name].parentElement.replaceChildren(...whole(name, text));
    if (verdict && !verdict.visible) {
      $("steer-status").textContent = verdict.strongest === null ? "The steered text is not fluent: steer less."
        : "No visible effect in this text. A sweep tries several, and other strengths.";
    }
  }
}

/** A text that is complete, marked by where its features fire when it is read without steering, and its figures. */
function whole(name, { tokens, shares, figures }) {
  const values = new Map(shares.map((share, i) => [i, share]).filter(([, share]) => share > 0));
  const look = h("button", { type: "button", class: "quiet", onclick: () => {
    $("look-text").value = field("prompt").value + tokens.join("");
    location.hash = "view=look";
    $("look-form").requestSubmit();
  } }, "look into it");
  const fires = edits().length ? `fires on ${percent(figures.rate)}, ` : "";
  return [h("h2", {}, TITLES[name]), passageText(tokens, values, 1, 0, tokens.length),
    h("p", { class: "small" }, `${two(figures.cross_entropy)} nats a token unsteered, ${fires}`,
      `${percent(figures.repetition)} repeated; `, look)];
}

// ---- a sweep ----

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Two curves over the strength: how often the feature fires, and nats a token more than the model's own text. */
function chart(rows) {
  const [own, ...rest] = rows, width = 320, height = 120;
  const most = Math.max(...rest.map((row) => row.strength), 1e-9);
  const curve = (name, value, top) => svg("polyline", { class: name, points: rows.map((row) =>
    `${36 + width * row.strength / most},${height - (height - 8) * Math.max(0, Math.min(1, value(row) / top))}`).join(" ") });
  const label = (x, y, text, anchor = "start") => svg("text", { x, y, "text-anchor": anchor }, text);
  const name = "Share of tokens it fires on, and nats more, by strength";
  return svg("svg", { class: "chart", viewBox: "0 0 440 150", role: "img", "aria-label": name },
    svg("line", { x1: 36, x2: 36 + width, y1: height, y2: height, stroke: "currentColor", "stroke-width": 0.5 }),
    curve("rate", (row) => row.rate, 1), curve("nats", (row) => row.cross_entropy - own.cross_entropy, 3),
    label(32, 14, "100%", "end"), label(32, height, "0", "end"), label(362, 14, "3 nats"), label(362, height, "0"),
    label(36, 140, "0"), label(36 + width, 140, figure(most), "end"), label(130, 140, "— fires on   - - nats more"));
}

const COLUMNS = ["Strength", "Nats a token", "Repeated", "Fires on", "A text"];

async function sweep(signal) {
  const length = Math.max(4, Math.min(32, Number(field("tokens").value))), rows = [];
  const wanted = { prompt: field("prompt").value, steer: currentEdit(), max_tokens: length, ...sampled() };
  $("texts").replaceChildren();
  $("swept").replaceChildren();
  for await (const item of stream("/sweep", wanted, signal)) {
    if ("strength" in item) rows.push(item);
    else $("steer-status").replaceChildren(item.visible === false ? h("strong", {}, "No visible effect. ") : "", item.why);
    const best = item.strongest ?? null;
    const take = (strength) => h("button", { type: "button", title: "Steer as strongly", onclick: () => use(strength, wanted.steer.features) },
      figure(strength));
    const row = ({ strength, cross_entropy, rate, repetition, text }) =>
      h("tr", { class: strength === best ? "best" : null },
        h("th", { scope: "row" }, strength === 0 ? "none" : take(strength)),
        [two(cross_entropy), percent(repetition), percent(rate), visible(text, { most: 160 })].map((one) => h("td", {}, one)));
    $("swept").replaceChildren(h("h2", {}, "Over the strength"), rows.length > 1 ? chart(rows) : "",
      h("div", { class: "scroll" }, h("table", {},
        h("thead", {}, h("tr", {}, COLUMNS.map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, rows.map(row)))));
  }
}

/** Take a strength of a sweep over some coefficients; several features keep their proportions, one its sign. */
function use(strength, swept) {
  const several = Object.values(swept).filter(Boolean).length > 1;
  for (const [feature, coefficient] of Object.entries(swept)) {
    const number = field(`f${feature}`);
    if (number) number.value = strength * (several ? coefficient : Math.sign(coefficient));
  }
  drawEdits();
  keep();
}

// ---- a conversation ----

const turns = []; // {role, content}

async function say(signal) {
  const line = $("line").value.trim();
  if (!line) return;
  const messages = [...turns, { role: "user", content: line }];
  const show = (who) => {
    const text = growing();
    $("turns").append(h("li", {}, h("p", { class: "eyebrow" }, who), text));
    return text;
  };
  show("You").append(...visible(line, { breaks: true }));
  $("line").value = "";
  const reply = async (who, steer) => {
    const text = show(who);
    let whole = "";
    const wanted = { messages, steer, stream: true, max_tokens: Number(field("tokens").value), ...sampled() };
    for await (const { choices: [{ delta }] } of stream("/v1/chat/completions", wanted, signal)) {
      whole += delta.content;
      text.append(...visible(delta.content, { breaks: true }));
    }
    return whole;
  };
  if ($("both").checked && edits().length) await reply("Without steering", {});
  const content = await reply(edits().length ? "Steered" : "The model", currentEdit());
  if (content.trim()) turns.push(messages.at(-1), { role: "assistant", content }); // chat formats take no empty turn
}

function startSteer() {
  const on = (id, event, work) => $(id).addEventListener(event, work);
  const submit = (id, status, work) => on(id, "submit", (event) => {
    event.preventDefault();
    stoppable($(status), work);
  });
  submit("steer-form", "steer-status", writeTexts);
  submit("chat-form", "chat-status", say);
  on("steer-form", "input", drawEdits);
  on("sweep", "click", () => stoppable($("steer-status"), sweep));
  on("halt", "click", () => state.running?.abort());
  on("copy", "click", () => copy($("command")));
  on("add", "click", () => {
    addEdit(Number($("another").value), 1);
    keep();
  });
  on("reset", "click", () => {
    state.running?.abort();
    turns.length = 0;
    $("turns").replaceChildren();
  });
  on("line", "keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("chat-form").requestSubmit();
  });
}

run(startLive);
