// ---- a text: its tokens on one side, the features that fire on them on the other ----

const MOST = 50; // features listed for the whole text

/**
 * Show tokens, [text, [[feature, activation], ...]] strongest first, and the features that fire on them.
 *
 * `about` says of a feature its `maximum` if that is known, its `name` as nodes or null, and its `href`; `chosen` is
 * called with the place of a token that is chosen, or null, and with the feature that the text is shaded by, or null.
 */
function showText(tokens, about, chosen = () => {}) {
  const strongest = new Map(); // feature -> its largest activation in the text
  for (const [, features] of tokens) {
    for (const [feature, value] of features) strongest.set(feature, Math.max(value, strongest.get(feature) ?? 0));
  }
  const scale = (feature) => about.maximum(feature) || strongest.get(feature);
  const share = ([feature, value]) => Math.min(1, value / scale(feature));
  let at = null, by = null; // the place of a token, and a feature
  const inAll = [...strongest].sort((a, b) => b[1] - a[1]).slice(0, MOST);

  const tipOf = ([feature, value]) =>
    `feature ${feature} at ${figure(value)}: ${h("span", {}, about.name(feature) ?? "not explained").textContent}`;

  /** Shade the text by one feature, or each token by its strongest. */
  function shade(feature = null) {
    by = feature;
    chosen(at, by);
    const shown = tokens.map(([, features]) =>
      feature === null ? features[0] : features.find(([one]) => one === feature));
    const shares = new Map(shown.flatMap((pair, i) => (pair ? [[i, share(pair)]] : [])));
    const text = passageText(tokens.map(([token]) => token), shares, 1, 0, tokens.length);
    text.querySelectorAll(".t").forEach((element, i) => {
      element.dataset.place = i;
      element.dataset.tip = shown[i] ? tipOf(shown[i]) : "0: does not fire";
      element.classList.toggle("chosen", i === at);
    });
    for (const name of ["click", "focusin"]) text.addEventListener(name, choose);
    $("text").replaceChildren(text);
    $("shading").replaceChildren(...(feature === null
      ? ["Shaded by the strongest feature of each token, as a share of that feature's maximum."]
      : [`Shaded by feature ${feature}. `, button("each token's strongest", () => shade())]));
  }

  /** List the features of one token, or of the whole text. */
  function list(place = null) {
    at = place;
    chosen(at, by);
    document.querySelectorAll("#text .t").forEach((element, i) => element.classList.toggle("chosen", i === place));
    $("firing-title").replaceChildren(...(place === null
      ? ["Strongest in the text"]
      : ["Strongest on ", chip(tokens[place][0]), " ", button("whole text", () => list())]));
    const shown = place === null ? inAll : tokens[place][1];
    $("firing").replaceChildren(...(shown.length
      ? shown.map(item)
      : [h("li", { class: "unnamed" }, "No feature fires here.")]));
  }

  function item([feature, value]) {
    const relative = about.maximum(feature) ? `${percent(share([feature, value]))} of its maximum` : null;
    return h("li", { "--share": share([feature, value]) },
      h("button", { type: "button", class: "quiet", title: "Where in the text it fires", onclick: () => shade(feature) },
        about.name(feature) ?? h("span", { class: "unnamed" }, "not explained")),
      h("span", { class: "numbers" }, h("a", { href: about.href(feature) }, `#${feature}`),
        h("span", {}, figure(value)), h("span", {}, relative)));
  }

  const button = (text, onclick) => h("button", { type: "button", class: "quiet small", onclick }, text);
  const choose = (event) => {
    const place = event.target.closest(".t")?.dataset.place;
    if (place != null) list(Number(place));
  };
  $("text").parentElement.parentElement.onkeydown = (event) => {
    if (event.key !== "Escape") return;
    shade();
    list();
  };
  shade();
  list();
}

