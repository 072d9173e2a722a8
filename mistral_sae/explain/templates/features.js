// ---- a list of features, of which only the lines in view are in the page, and a view of each ----
//
// The page that uses it has `recordOf`, i -> what the view of a feature shows beyond the index or null, and `route`.

const ROW = 76; // height of a line of the list, in px, as in the style
const PART = 0.05; // of the score, that each further part of an explanation costs where the clearest come first

// The index has a list for each column; a feature's place in them is `i`, its place in the list of those found `place`
const state = {
  index: null,
  position: new Map(), // feature -> i
  found: [], // i of the features that search and filters leave, in order
  cursor: 0, // the place that j and k move
  lines: new Map(), // place -> element
  open: null, // the feature that is shown
  opening: 0, // counts, so that only the last one asked for is shown
  title: document.title, // of the run
  actions: () => null, // feature -> what can be done with it
};

// ---- search, filter, sort ----

/** Words, and whole tokens in double quotes. */
function terms(query) {
  return [...query.matchAll(/"([^"]+)"|([^\s"]+)/g)].map(([, token, word]) => ({ token, word: word?.toLowerCase() }));
}

function matcher(query, scope) {
  const { feature, explanation, fires_on, logit_lens } = state.index;
  const wanted = terms(query), inText = scope === "anywhere" || scope === "explanation";
  const tokensOf = {
    anywhere: (i) => [...fires_on[i], ...logit_lens[i]],
    explanation: () => [],
    fires: (i) => fires_on[i],
    lens: (i) => logit_lens[i],
  }[scope];
  return (i) => {
    const text = inText ? explanation[i] : "", tokens = tokensOf(i);
    return wanted.every(({ token, word }) => token !== undefined
      ? tokens.includes(token) || text.includes(token)
      : text.toLowerCase().includes(word) || tokens.some((one) => one.toLowerCase().includes(word)) ||
        (scope === "anywhere" && word.replace("#", "") === String(feature[i])));
  };
}

const isInput = (i) => state.index.same_token[i] >= state.index.input_share;
const isOutput = (i) => state.index.predicted_next[i] >= state.index.output_share;

function filters() {
  const { explanation, maximum, score } = state.index;
  const chosen = [];
  const add = (id, tests) => $(id).value && chosen.push(tests[$(id).value]);
  add("explained", { yes: (i) => explanation[i] !== "", no: (i) => explanation[i] === "" });
  add("alive", { alive: (i) => maximum[i] > 0, dead: (i) => !(maximum[i] > 0) });
  add("kind", { input: isInput, output: isOutput, neither: (i) => !isInput(i) && !isOutput(i) });
  if ($("least").value) chosen.push((i) => score[i] !== null && score[i] >= Number($("least").value));
  if ($("search").value.trim()) chosen.push(matcher($("search").value, $("scope").value));
  return chosen;
}

const isReversed = () => $("reverse").getAttribute("aria-pressed") === "true";

function find() {
  const { feature } = state.index, column = state.index[$("sort").value], tests = filters();
  const direction = ($("sort").value === "feature" ? 1 : -1) * (isReversed() ? -1 : 1);
  state.found = [...feature.keys()].filter((i) => tests.every((test) => test(i)));
  state.found.sort((a, b) => // what has no value comes last, whichever way
    (column[a] === null) - (column[b] === null) || direction * (column[a] - column[b]) || feature[a] - feature[b]);
  state.cursor = 0;

  const all = count(feature.length), none = state.found.length === 0;
  $("matches").textContent = tests.length ? `${count(state.found.length)} of ${all} features` : `${all} features`;
  $("empty").hidden = !none;
  $("list").hidden = none;
  $("clear").hidden = feature.length === 0;
  $("empty").firstElementChild.textContent = feature.length === 0 ? "There are no features in this report."
    : $("search").value ? `No features match “${$("search").value}”.` : "No features match these filters.";
  $("list").scrollTop = 0;
  for (const element of state.lines.values()) element.remove();
  state.lines.clear();
  $("rows").style.setProperty("height", `${state.found.length * ROW}px`);
  drawList();
}

function clearFilters() {
  $("filters").reset();
  $("reverse").setAttribute("aria-pressed", "false");
  find();
  $("search").focus();
}

// ---- the list ----

/** An explanation: what the feature is strong on, and paler, what it is weak on. */
function said(text) {
  const [strong, weak] = text.split("; weakly ");
  return [words(strong), weak && h("span", { class: "unnamed" }, "; weakly ", words(weak))];
}

/** What to call a feature: what its explanation says it is strong on, else the tokens it fires on. */
function nameOf(i) {
  const { explanation, maximum, fires_on, logit_lens } = state.index;
  if (explanation[i]) return h("span", { class: "name" }, said(explanation[i])[0]);
  const [what, known] = fires_on[i].length ? ["fires on ", fires_on[i]] : ["raises ", logit_lens[i]];
  const tokens = maximum[i] > 0 ? [what, chips(known.slice(0, 3))] : "never fired";
  return h("span", { class: "name unnamed" }, tokens);
}

function line(place) {
  const i = state.found[place], { feature, density, maximum, score } = state.index;
  const bar = score[i] === null
    ? h("span", { class: "score none" }, "no score")
    : h("span", { class: "score", title: "score", "--share": Math.max(0, score[i]) }, two(score[i]));
  const link = h("a", { href: `#feature=${feature[i]}`, onfocus: () => (state.cursor = place) },
    nameOf(i),
    h("span", { class: "numbers" },
      h("span", {}, `#${feature[i]}`),
      h("span", { title: "density: share of tokens on which it fires" }, percent(density[i])),
      h("span", { title: "its largest activation" }, `max ${figure(maximum[i])}`),
      bar));
  if (feature[i] === state.open) link.setAttribute("aria-current", "true");
  const attributes = { "--y": `${place * ROW}px`, "aria-posinset": place + 1, "aria-setsize": state.found.length };
  return h("li", { class: "line", ...attributes }, link);
}

function drawList() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(state.found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4) - 1;
  for (const [place, element] of state.lines) {
    if ((place >= first && place <= last) || element.contains(document.activeElement)) continue;
    element.remove();
    state.lines.delete(place);
  }
  for (let place = last; place >= first; place--) {
    if (state.lines.has(place)) continue;
    state.lines.set(place, line(place));
    $("rows").insertBefore(state.lines.get(place), state.lines.get(place + 1) ?? null);
  }
}

/** Bring a place of the list into view, with some around it, and the keyboard to it. */
function goTo(place, { focus = true } = {}) {
  if (!state.found.length) return;
  state.cursor = Math.max(0, Math.min(place, state.found.length - 1));
  const list = $("list"), top = state.cursor * ROW, margin = Math.min(ROW, list.clientHeight / 4);
  if (top - margin < list.scrollTop) list.scrollTop = top - margin;
  const bottom = top + ROW + margin - list.clientHeight;
  if (bottom > list.scrollTop) list.scrollTop = bottom;
  drawList();
  if (focus) state.lines.get(state.cursor).firstElementChild.focus({ preventScroll: true });
}

// ---- a feature ----

function heading(record, i) {
  const { label } = record, { same_token, predicted_next, maximum } = state.index;
  const tag = (...children) => h("span", { class: "tag" }, children);
  return h("header", {},
    h("div", { class: "above" }, h("p", { class: "eyebrow" }, `Feature ${record.feature}`), neighbours(i)),
    label?.explanation
      ? h("h1", { tabindex: "-1" }, said(label.explanation))
      : h("h1", { tabindex: "-1", class: "unnamed" }, "Not explained"),
    label && label.status !== "ok" && h("p", { class: "notice" },
      label.meaning, label.reason !== label.meaning && label.reason && [": ", words(label.reason)]),
    h("p", { class: "tags" },
      label?.explanation && tag("explained by ", words(label.explainer), label.explainer === "offline" && ", without a model"),
      isInput(i) && tag("input feature"), isOutput(i) && tag("output feature")),
    label?.concept && concept(label),
    maximum[i] > 0 && same_token[i] !== null && h("p", { class: "small" },
      `${percent(same_token[i])} of its passages peak on one and the same token; `,
      `in ${percent(predicted_next[i])} the token after the peak is one that it raises in the logit lens.`));
}

/** How well a feature tells the concept that it was chosen for. */
function concept({ explanation, concept: { precision, lift, recall } }) {
  return h("p", {}, `${percent(precision)} of the tokens where it fires are ${explanation}, ${figure(lift)} times as many `,
    `as by chance, and it fires on ${percent(recall)} of these. Of all features it tells them best. Counted in documents `,
    "that it was not chosen on.");
}

/** Links to the features before and after it in the list. */
function neighbours(i) {
  const place = state.found.indexOf(i);
  const link = (to, key, text) => to !== undefined &&
    h("a", { href: `#feature=${state.index.feature[to]}`, title: `${text} in the list (${key})` }, text);
  return place < 0 ? null : h("nav", { "aria-label": "In the list" },
    link(state.found[place - 1], "k", "previous"), link(state.found[place + 1], "j", "next"));
}

function facts(i) {
  const { density, maximum } = state.index;
  const fact = (name, value, meaning) => h("div", { class: "fact" },
    h("dt", {}, name), h("dd", { class: "value" }, value), h("dd", { class: "meaning" }, meaning));
  return h("dl", { class: "facts" },
    fact("Density", percent(density[i]), oneIn(density[i])),
    fact("Maximum", figure(maximum[i]), "in units of the standardised residual"));
}

function histogram(bins, maximum) {
  const most = Math.max(1, ...bins), width = maximum / bins.length;
  const bar = (n, b) => h("span", {
    class: "bar",
    "data-tip": `${figure(b * width)} to ${figure((b + 1) * width)}: ${count(n)} token${n === 1 ? "" : "s"}`,
    "--share": n > 0 ? 0.03 + 0.97 * Math.log1p(n) / Math.log1p(most) : 0,
  });
  const label = `${bins.length} bins from 0 to ${figure(maximum)}, at most ${count(most)} tokens in one`;
  return h("figure", { class: "histogram" },
    h("figcaption", {}, h("strong", {}, "Activations"),
      ` On how many tokens it fires how strongly: the tallest bar is ${count(most)} tokens, on a log scale.`),
    h("div", { class: "bars", role: "img", "aria-label": label }, bins.map(bar)),
    h("div", { class: "axis", "aria-hidden": "true" },
      [0, maximum / 2, maximum].map((value) => h("span", {}, figure(value)))));
}

function steering(feature) {
  const command = h("pre", {}, `${state.index.demo} FEATURE_INDEX=${feature}`);
  const button = h("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(command)) ? "Copied" : "Selected, press Ctrl-C";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return h("section", { class: "steer" }, h("h2", {}, "Steer with it"), state.actions(feature),
    h("div", { class: "code" }, command, button),
    h("p", { class: "small" }, "As strongly as a few texts stay fluent; COEFFICIENT sets it, in units of the feature's maximum."));
}

/** Copy an element's text; where the clipboard is closed to the scripts of a file, through the selection. */
async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}

function scores(label) {
  const methods = Object.entries(label?.scores ?? {});
  if (!methods.length) return null;
  const titles = ["Scorer", "Score, 95% interval", "Another feature's", "Top token alone", "Answers"];
  const row = ([method, score]) => h("tr", {},
    h("th", { scope: "row" }, method),
    h("td", {}, h("strong", {}, two(score.value)),
      score.low !== null && h("span", { class: "small" }, ` ${two(score.low)} to ${two(score.high)}`)),
    h("td", {}, two(score.other_feature)),
    h("td", {}, two(score.top_token)),
    h("td", {}, `${score.answered} of ${score.answered + score.unanswered}`));
  const recall = label.scores.detection?.recall ?? [], r2 = label.scores.simulation?.r2;
  const notes = [
    recall.length > 0 && `Detection finds ${recall.map(percent).join(", ")} of the passages, from weakest to strongest.`,
    r2 != null && `The simulation explains ${percent(r2)} of the variance.`,
    label.concept && "A concept gives no answer for passages of files that were not parsed.",
  ].filter(Boolean);
  return h("section", {}, h("h2", {}, "Does the explanation hold?"),
    h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, titles.map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, methods.map(row)))),
    notes.length > 0 && h("p", { class: "small" }, notes.join(" ")));
}

/** A heading with what is below it: passages, or a line that says that there are none. */
function group(title, items, isOpen = true) {
  const number = h("span", { class: "count" }, count(items.length));
  return h("details", { open: isOpen }, h("summary", {}, title, " ", number),
    items.length ? h("ol", { class: "examples" }, items) : h("p", { class: "unnamed" }, "None was found in this range."));
}

function examples(record, maximum) {
  const n = state.index.intervals;
  const show = (passages) => passages.map((one) => passage(one, maximum));
  const interval = (at) => {
    const [low, high] = [at / n, (at + 1) / n];
    const title = `${100 * low}–${100 * high}% of the maximum, ${figure(low * maximum)} to ${figure(high * maximum)}`;
    return group(title, show(record.spread.filter((one) => one[5] === at)));
  };
  return h("section", {}, h("h2", {}, "Where it fires"),
    h("p", { class: "small" },
      "A token's shade and the thickness of its underline say how strongly; point at it for the value."),
    group("The strongest passages", show(record.top)),
    h("h3", {}, "A random choice, by strength"), [...Array(n).keys()].reverse().map(interval));
}

function ranked(title, meaning, rows) {
  const largest = Math.max(...rows.map(([, value]) => Math.abs(value)), 1e-9);
  const item = ([name, value, shown]) => h("li", { "--share": Math.abs(value) / largest },
    h("span", { class: "what" }, name), h("span", { class: "number" }, shown));
  return h("section", {}, h("h3", {}, title), h("p", { class: "small" }, meaning),
    rows.length ? h("ol", { class: "ranked" }, rows.map(item)) : h("p", { class: "unnamed" }, "None."));
}

function connections(record) {
  const token = ([text, value]) => [chip(text), value, `${value > 0 ? "+" : ""}${figure(value)}`];
  const feature = (shown) => ([other, value]) => {
    const i = state.position.get(other);
    const name = i === undefined ? [`#${other} `, h("span", { class: "unnamed" }, "not here")]
      : [h("a", { href: `#feature=${other}` }, `#${other}`), " ", nameOf(i)];
    return [name, value, shown(value)];
  };
  return h("section", {}, h("h2", {}, "What it is connected to"), h("div", { class: "columns" },
    ranked("Logit lens: raised", "tokens whose logits its decoder row raises most", record.promoted.map(token)),
    ranked("Logit lens: lowered", "tokens whose logits it lowers most", record.suppressed.map(token)),
    ranked("Nearest", "features by the cosine of their decoder rows", record.nearest.map(feature(two))),
    ranked("Fires together with", "features, by the share of its tokens", record.coactive.map(feature(percent)))));
}

const KINDS = { held_out: "held-out passage", random: "random passage", hard: "hard negative" };
const ANSWERS = { detection: ["does not fire", "fires"], fuzzing: ["marks are moved", "marks are right"] };

function judged(record, maximum) {
  const item = ([method, key, truth, verdict]) => {
    const [no, yes] = ANSWERS[method] ?? ["no", "yes"];
    const isRight = verdict === truth, isMissing = verdict === null;
    const [kind, mark] = isMissing ? ["none", "– no answer"] : isRight ? ["right", "✓ right"] : ["wrong", "✗ wrong"];
    const badge = h("span", { class: `verdict ${kind}` }, mark);
    const judgement = isMissing ? "" : `, judged: ${verdict ? yes : no}`;
    const said = h("span", {}, `${KINDS[key.split(" ")[0]]}: ${truth ? yes : no}${judgement}`);
    const found = record.judged_passages[key];
    if (!found) return h("li", { class: "example" }, h("p", { class: "meta" }, badge, said));
    return passage(found, maximum, badge, said);
  };
  const method = (name) => {
    const items = record.judged.filter(([one]) => one === name), answered = items.filter((one) => one[3] !== null);
    const right = answered.filter(([, , truth, verdict]) => truth === verdict).length;
    const missing = items.length > answered.length ? `, ${items.length - answered.length} without an answer` : "";
    return group(`${name}: ${right} of ${answered.length} right${missing}`, items.map(item), false);
  };
  const methods = [...new Set(record.judged.map(([name]) => name))];
  return methods.length > 0 && h("section", {}, h("h2", {}, "Judged passages"),
    h("p", { class: "small" }, "From documents that the explainer did not see."), methods.map(method));
}

function featureView(record) {
  const i = state.position.get(record.feature), maximum = state.index.maximum[i], isAlive = maximum > 0;
  return [
    heading(record, i),
    h("div", { class: "split" }, h("div", {}, facts(i), steering(record.feature)),
      isAlive && histogram(record.histogram, maximum)),
    connections(record),
    scores(record.label),
    isAlive && examples(record, maximum),
    judged(record, maximum),
  ].filter(Boolean);
}

/** A feature of which there are no passages here: what the index has of it. */
function briefView(i) {
  const { feature, fires_on, logit_lens, maximum } = state.index;
  const row = (title, tokens) => tokens.length > 0 && h("div", {}, h("dt", {}, title), h("dd", {}, chips(tokens)));
  return [
    heading({ feature: feature[i], label: null }, i),
    h("div", { class: "split" }, h("div", {}, facts(i), steering(feature[i])),
      h("dl", { class: "plain" }, row("Fires on", maximum[i] > 0 ? fires_on[i] : []), row("Raises", logit_lens[i]))),
    h("p", { class: "small" },
      `Its passages are not here: explain.py SELECT="[${feature[i]}]" adds them, and an explanation.`),
  ];
}

async function openFeature(feature) {
  const opening = ++state.opening, i = state.position.get(feature);
  let view;
  try {
    if (i === undefined) {
      view = [h("h1", { tabindex: "-1" }, `There is no feature ${feature} here`),
        h("p", {}, h("a", { href: "#features" }, "Back to the list"))];
    } else {
      const record = await recordOf(i);
      view = record ? featureView(record) : briefView(i);
    }
  } catch (error) {
    view = [h("h1", { tabindex: "-1" }, `Feature ${feature} cannot be read`), h("p", { class: "notice" }, error.message)];
  }
  if (opening !== state.opening) return; // another one was asked for meanwhile
  state.open = feature;
  $("feature").replaceChildren(...view);
  document.title = `Feature ${feature}: ${state.index.explanation[i] || "not explained"}`;
  show("feature");
  if (state.found.includes(i)) goTo(state.found.indexOf(i), { focus: false });
  $("feature").querySelector("h1").focus({ preventScroll: true });
  scrollTo(0, 0);
}

// ---- views and keys ----

/** Show one part of the page beside the list; with "features", which is the list, the first of them. */
function show(view) {
  document.documentElement.dataset.view = view;
  const parts = [...$("main").children];
  const part = parts.some((each) => each.id === view) ? view : parts.find((each) => each.tagName === "SECTION").id;
  for (const each of parts) each.hidden = each.id !== part;
  for (const link of document.querySelectorAll("a[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const [place, element] of state.lines) {
    const isOpen = state.index.feature[state.found[place]] === state.open;
    if (isOpen) element.firstElementChild.setAttribute("aria-current", "true");
    else element.firstElementChild.removeAttribute("aria-current");
  }
}

/** Show one of the parts, and no feature. */
function leaveFeature(view) {
  state.opening++;
  state.open = null;
  document.title = state.title;
  show(view);
  drawList(); // it may have been out of sight until now
  if (view === "features" && document.activeElement !== $("search")) goTo(state.cursor);
}

const isListVisible = () => $("browser").offsetParent !== null;

function move(step) {
  const { feature } = state.index;
  if (state.open !== null) {
    const next = state.found[state.found.indexOf(state.position.get(state.open)) + step];
    if (next !== undefined) location.replace(`#feature=${feature[next]}`);
  } else if (!isListVisible()) location.hash = "#features";
  else goTo(state.lines.get(state.cursor)?.contains(document.activeElement) ? state.cursor + step : state.cursor);
}

function search() {
  if (!isListVisible()) {
    show("features");
    location.hash = "#features";
  }
  $("search").select();
}

function random() {
  const i = state.found[Math.floor(Math.random() * state.found.length)];
  if (i !== undefined) location.hash = `#feature=${state.index.feature[i]}`;
}

const KEYS = { "/": search, j: () => move(1), k: () => move(-1), r: random, "?": () => $("help").showModal() };

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const isTyping = event.target.matches("input, select, textarea");
  if (event.key === "Escape") {
    if (isTyping) event.target.blur();
    else if (state.open !== null) location.hash = "#features";
  } else if (event.key === "Enter" && event.target === $("search")) goTo(0);
  else if (!isTyping && KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
}

/** Begin with an index, the columns of the list. */
async function startList(index) {
  const parts = index.explanation.map((text) => text.split("; weakly ")[0].split("; ").length); // "a; b; weakly c": 2
  const clearness = (score, i) => index.concept[i] !== null ? 1 + index.concept[i] // a concept: before all others
    : score === null ? null : score - PART * (parts[i] - 1);
  state.index = { ...index, clear: index.score.map(clearness) };
  state.position = new Map(index.feature.map((feature, i) => [feature, i]));
  if (index.feature.length > index.records) $("explained").value = "yes"; // the others are found when they are looked for
  find();
  $("filters").addEventListener("input", find);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("reverse").addEventListener("click", () => {
    $("reverse").setAttribute("aria-pressed", String(!isReversed()));
    find();
  });
  $("random").addEventListener("click", random);
  $("clear").addEventListener("click", clearFilters);
  $("help-button").addEventListener("click", KEYS["?"]);
  $("list").addEventListener("scroll", drawList, { passive: true });
  addEventListener("resize", drawList);
  addEventListener("hashchange", route);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  document.addEventListener("keydown", onKey);
  await route();
}
