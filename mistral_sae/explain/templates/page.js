"use strict";

// What both pages share: elements, numbers, compressed data, tokens, the tip. What comes from a corpus or a model
// enters the page as text nodes only, through `h`; there is no innerHTML anywhere.

const BEFORE = 16, AFTER = 8; // tokens shown on either side of a passage's peak, until more are asked for
const LONG = 200; // characters of a token that are shown, likewise
const CHIP = 60; // characters of a token in a list

const $ = (id) => document.getElementById(id);

/** An element: attributes (`--x` are style properties, `onx` listeners), then children; strings become text. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

// ---- numbers ----

const count = (n) => n.toLocaleString("en-US");

function figure(x) {
  if (x == null) return "–";
  const size = Math.abs(x), sign = x < 0 ? "−" : "";
  if (size === 0) return "0";
  if (size >= 100) return sign + count(Math.round(size));
  return sign + (size < 0.001 ? size.toExponential(1) : size.toPrecision(3));
}

const two = (x) => (x == null ? "–" : x.toFixed(2).replace(/^-(?=0\.00$)/, "").replace("-", "−"));

/** To two significant digits below 10 %, to one decimal above: 0.012%, 98.2%. */
function percent(share) {
  if (share == null) return "–";
  const value = 100 * share;
  return `${Number(value >= 9.95 ? value.toFixed(1) : value.toPrecision(2))}%`;
}

const oneIn = (share) => (share > 0 ? `one token in ${count(Math.max(1, Math.round(1 / share)))}` : "on no token");

// ---- data: base64 of gzip of JSON ----

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// ---- tokens ----

// Control characters, the no-break and the soft hyphen, marks of direction, what has no width
const INVISIBLE = "\\u0000-\\u001f\\u007f-\\u00a0\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f" +
  "\\u2028-\\u202e\\u2060-\\u2069\\ufeff";
const SPECIAL = new RegExp(`( +)|(\\r\\n|\\n|\\r)|(\\t)|([${INVISIBLE}])`, "g");

const sign = (text) => h("span", { class: "sign", "data-sign": text });

/** A token as nodes: spaces, line breaks and what has no form of its own made visible. */
function visible(text, { breaks = false, most = Infinity } = {}) {
  const left = text.length - most;
  const shown = left > 0 ? text.slice(0, most) : text;
  const nodes = [];
  let end = 0;
  for (const match of shown.matchAll(SPECIAL)) {
    const [all, spaces, newline, tab, other] = match;
    nodes.push(shown.slice(end, match.index));
    end = match.index + all.length;
    if (spaces) nodes.push(h("span", { class: "space" }, spaces));
    else if (newline) nodes.push(sign("⏎"), breaks ? "\n" : "");
    else if (tab) nodes.push(sign("⇥"), breaks ? "\t" : "");
    else nodes.push(sign(`U+${other.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`));
  }
  nodes.push(shown.slice(end));
  if (left > 0) nodes.push(sign(`… ${count(left)} more characters`));
  return nodes;
}

/** Words from a model or a path, apart from the direction of the text around them. */
const words = (text, most) => h("bdi", {}, visible(text, { most }));

/** A token by itself, in a list or a sentence. */
const chip = (text) => h("code", { class: "token" }, text === "" ? sign("empty") : visible(text, { most: CHIP }));

const chips = (texts) => texts.map((text) => [chip(text), " "]);

/** A token in running text: shaded and underlined by its share of the maximum, its value in the tip. */
function tokenInText(text, value, maximum, most) {
  const share = maximum > 0 ? Math.min(1, value / maximum) : 0;
  const attributes = { class: "t", tabindex: "-1", "data-tip": "0: does not fire" };
  if (value > 0) {
    attributes["data-tip"] = maximum > 0 ? `${figure(value)}, ${percent(share)} of the maximum` : figure(value);
    attributes["data-level"] = Math.max(1, Math.ceil(4 * share));
    attributes["--share"] = share;
  }
  // A character that is spread over several tokens belongs to the last: the others have no text
  return h("span", attributes, text === "" && value > 0 ? sign("◌") : visible(text, { breaks: true, most }));
}

/** Tokens `from` up to `to`, as one stop of the Tab key inside which the arrow keys move. */
function passageText(tokens, values, maximum, from, to, most) {
  const text = h("div", {
    class: "passage", dir: "auto", tabindex: "0", role: "group", "aria-label": "Passage, arrow keys move along it",
  });
  if (from > 0) text.append(sign("…"));
  for (let i = from; i < to; i++) text.append(tokenInText(tokens[i], values.get(i) ?? 0, maximum, most));
  if (to < tokens.length) text.append(sign("…"));
  return text;
}

/** [document, start, tokens, active tokens, their values] as a list item: what surrounds the peak, and all on demand. */
function passage([source, start, tokens, places, activations], maximum, ...notes) {
  const values = new Map(places.map((place, i) => [place, activations[i]]));
  const strength = Math.max(0, ...activations);
  const peak = strength > 0 ? places[activations.indexOf(strength)] : tokens.length >> 1;
  const from = Math.max(0, peak - BEFORE), to = Math.min(tokens.length, peak + AFTER + 1);
  const isCut = from > 0 || to < tokens.length || tokens.some((token) => token.length > LONG);

  let text = passageText(tokens, values, maximum, from, to, LONG);
  const more = h("button", { type: "button", class: "quiet more", "aria-expanded": "false" }, "more context");
  more.addEventListener("click", () => {
    const opens = more.getAttribute("aria-expanded") === "false";
    const next = opens
      ? passageText(tokens, values, maximum, 0, tokens.length)
      : passageText(tokens, values, maximum, from, to, LONG);
    text.replaceWith(next);
    text = next;
    more.setAttribute("aria-expanded", String(opens));
    more.textContent = opens ? "less context" : "more context";
  });
  const where = h("span", { class: "where" }, words(source, 120), `, token ${count(start + peak)}`);
  return h("li", { class: "example" }, text,
    h("p", { class: "meta" }, notes, strength > 0 && h("strong", {}, figure(strength)), where, isCut && more));
}

// ---- the tip, for a mouse, a finger and the keyboard ----

let tipOwner = null;

function showTip(target) {
  const tip = $("tip");
  tipOwner = target?.closest?.("[data-tip]") ?? null;
  tip.hidden = tipOwner === null;
  if (tip.hidden) return;
  tip.textContent = tipOwner.dataset.tip;
  const box = tipOwner.getClientRects()[0] ?? tipOwner.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = box.left + box.width / 2 - size.width / 2, top = box.top - size.height - 6;
  tip.style.setProperty("left", `${Math.max(4, Math.min(left, innerWidth - size.width - 4))}px`);
  tip.style.setProperty("top", `${top < 4 ? box.bottom + 6 : top}px`);
}

/** The arrow keys, inside a passage: from one firing token to the next. */
function moveInPassage(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], inside = event.target.closest?.(".passage");
  if (!step || !inside || event.ctrlKey || event.metaKey || event.altKey) return;
  const tokens = [...inside.querySelectorAll(".t")], firing = tokens.filter((token) => token.dataset.level);
  const stops = firing.length ? firing : tokens;
  const at = stops.indexOf(event.target), first = step > 0 ? 0 : stops.length - 1;
  stops[at < 0 ? first : Math.max(0, Math.min(at + step, stops.length - 1))]?.focus();
  event.preventDefault();
}

for (const name of ["pointerover", "focusin", "click"]) {
  document.addEventListener(name, (event) => showTip(event.target));
}
document.addEventListener("focusout", () => showTip(null));
document.addEventListener("pointerleave", () => showTip(null));
document.addEventListener("scroll", () => showTip(tipOwner), { capture: true, passive: true });
document.addEventListener("keydown", moveInPassage);

/** Run a page's start; what goes wrong is said in the page. */
function run(start) {
  start().then(
    () => performance.mark("ready"),
    (error) => {
      const isOld = typeof DecompressionStream === "undefined";
      const reason = isOld ? "this browser is too old for it; use one of 2023 or newer" : error.message;
      document.body.prepend(h("p", { class: "notice" }, `This page cannot be shown: ${reason}.`));
    },
  );
}
