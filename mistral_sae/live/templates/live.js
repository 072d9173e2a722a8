// ---- the live page: requests, the address, and the view of a text ----

const GONE = "The server does not answer: start demo.py again, then try once more.";

/** A request; raises what the server says, in a sentence. */
async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const asked = body === undefined ? {} : { method: "POST", headers, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...asked, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(GONE);
  }
  if (response.ok) return response;
  const text = await response.text();
  throw new Error(text.startsWith("{") ? JSON.parse(text).error.message : `${response.status} ${response.statusText}`);
}

/** The items of a stream of server-sent events as they come. */
async function* stream(path, body, signal) {
  const reader = (await ask(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(GONE);
    });
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const item = JSON.parse(data);
      if (item.error) throw new Error(item.error.message);
      yield item;
    }
  }
}

/** Do something, and say in a line of the page what went wrong. */
async function saying(line, work) {
  line.textContent = "";
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") line.replaceChildren(h("span", { class: "verdict wrong" }, words(error.message)));
  }
}

// ---- the address holds the whole state: the view, and the fields of the forms ----

const kept = () => [...document.querySelectorAll("form.kept [name]")];

/** Bring the address up to date without another entry in the history. */
function keep() {
  const view = document.documentElement.dataset.view;
  const params = new URLSearchParams(state.open === null ? { view } : { feature: state.open });
  for (const field of kept()) if (field.value || field.defaultValue) params.set(field.name, field.value);
  history.replaceState(null, "", `#${params}`);
}

/** Show what the address asks for. */
async function route() {
  const wanted = new URLSearchParams(location.hash.slice(1)), feature = wanted.get("feature");
  for (const [name] of wanted) if (/^f\d+$/.test(name)) addEdit(Number(name.slice(1)), 1);
  for (const field of kept().filter(({ name }) => wanted.has(name))) {
    const before = field.value;
    field.value = wanted.get(field.name);
    if (!field.value && wanted.get(field.name)) field.value = before; // it was no number, or none of the choices
  }
  drawEdits();
  if (/^\d+$/.test(feature ?? "")) await openFeature(Number(feature));
  else leaveFeature(wanted.has("features") ? "features" : wanted.get("view") ?? "look");
  if (!wanted.has("features")) keep();
}

// ---- look: a text, and what fires on it ----

const maximumOf = (feature) => state.index.maximum[state.position.get(feature)];
const linked = (feature) =>
  [h("a", { href: `#feature=${feature}` }, `#${feature}`), " ", nameOf(state.position.get(feature))];

/** Read a text: its tokens, each with [feature, activation] pairs, strongest first. */
async function read(text) {
  const { tokens, features, activations } = await (await ask("/activations", { text, top: 256 })).json();
  return tokens.map((token, i) => [token, features[i].map((feature, k) => [feature, activations[i][k]])]);
}

const about = {
  maximum: maximumOf,
  name: (feature) => nameOf(state.position.get(feature)),
  href: (feature) => `#feature=${feature}`,
};

async function look() {
  const text = $("look-text").value, against = document.querySelector("[name=against]").value;
  $("look-status").textContent = "reading …";
  const tokens = await read(text);
  $("found").hidden = false;
  $("effect").replaceChildren();
  showText(tokens, about, (at, by) => saying($("look-status"), () => showEffect(text, tokens, at, by)));
  $("contrast").replaceChildren(...(against ? contrast(tokens, await read(against)) : []));
  $("look-status").textContent = `${count(tokens.length)} tokens: choose one, or a feature`;
}

/** What the strongest feature of a token, or the one that the text is shaded by, changes in the next token. */
async function showEffect(text, tokens, at, by) {
  const feature = by ?? tokens[at]?.[1][0]?.[0];
  if (at === null || feature === undefined) return $("effect").replaceChildren();
  const { raised, lowered } = await (await ask("/effects", { text, feature, position: at })).json();
  const list = (title, rows) => ranked(title, "with it, and without it", rows.map(([token, as_is, without]) =>
    [chip(token), as_is - without, `${percent(as_is)} ← ${percent(without)}`]));
  $("effect").replaceChildren(
    h("h3", {}, "What feature ", linked(feature), " changes in the token after ", chip(tokens[at][0])),
    h("div", { class: "columns" }, list("Made likelier", raised), list("Made less likely", lowered)));
  return undefined;
}

/** Which features fire more on one text than on another: mean activations, as shares of the features' maxima. */
function contrast(here, there) {
  const mean = (tokens, of, sign) => {
    for (const [, features] of tokens) {
      for (const [feature, value] of features) {
        of.set(feature, (of.get(feature) ?? 0) + sign * value / tokens.length / (maximumOf(feature) || value));
      }
    }
    return of;
  };
  const sorted = [...mean(there, mean(here, new Map(), 1), -1)].sort((a, b) => b[1] - a[1]);
  const signed = (by) => `${by > 0 ? "+" : "−"}${percent(Math.abs(by))}`;
  const rows = (some) => some.map(([feature, by]) => [linked(feature), by, signed(by)]);
  const meaning = "features by the difference of their mean activations, in shares of the maximum";
  return [ranked("More on this text", meaning, rows(sorted.slice(0, 15).filter(([, by]) => by > 0))),
    ranked("More on the other", meaning, rows(sorted.slice(-15).reverse().filter(([, by]) => by < 0)))];
}

// ---- a feature, from the server ----

const recordOf = async (i) => (await ask(`/features/${state.index.feature[i]}`)).json();

async function startLive() {
  const index = await (await ask("/features")).json();
  state.actions = (feature) => h("button", { type: "button", class: "main", onclick: () => {
    addEdit(feature, 1);
    location.hash = "view=steer";
  } }, "Steer with it here");
  startSteer();
  document.querySelectorAll("form.kept").forEach((form) => form.addEventListener("input", keep));
  $("look-form").addEventListener("submit", (event) => {
    event.preventDefault();
    saying($("look-status"), look);
  });
  await startList(index);
  if ($("look-text").value) await saying($("look-status"), look);
}
