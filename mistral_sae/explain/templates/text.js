// ---- the page of a text: its tokens on one side, the features that fire on them on the other ----

const MOST = 50; // features listed for the whole text

async function startText() {
  const { tokens, explanations, maxima, fires_on } = await unpack($("text-data").textContent);
  const strongest = new Map(); // feature -> its largest activation in the text
  for (const [, features] of tokens) {
    for (const [feature, value] of features) strongest.set(feature, Math.max(value, strongest.get(feature) ?? 0));
  }
  const scale = (feature) => maxima[feature] || strongest.get(feature);
  const share = ([feature, value]) => Math.min(1, value / scale(feature));
  let chosen = null; // a token's place
  const inAll = [...strongest].sort((a, b) => b[1] - a[1]).slice(0, MOST);

  /** Shade the text by one feature, or each token by its strongest. */
  function shade(feature = null) {
    const shown = tokens.map(([, features]) =>
      feature === null ? features[0] : features.find(([one]) => one === feature));
    const shares = new Map(shown.flatMap((pair, i) => (pair ? [[i, share(pair)]] : [])));
    const text = passageText(tokens.map(([token]) => token), shares, 1, 0, tokens.length);
    text.querySelectorAll(".t").forEach((element, i) => {
      element.dataset.place = i;
      element.dataset.tip = shown[i] ? `feature ${shown[i][0]}: ${figure(shown[i][1])}` : "0: does not fire";
      element.classList.toggle("chosen", i === chosen);
    });
    $("text").replaceChildren(text);
    $("shading").replaceChildren(...(feature === null
      ? ["Shaded by the strongest feature of each token, as a share of that feature's maximum."]
      : [`Shaded by feature ${feature}. `, button("each token's strongest", () => shade())]));
  }

  /** List the features of one token, or of the whole text. */
  function list(place = null) {
    chosen = place;
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
    const name = explanations[feature] ? words(explanations[feature])
      : fires_on[feature] ? ["fires on ", chips(fires_on[feature].slice(0, 3))] : "not explained";
    const relative = maxima[feature] ? `${percent(share([feature, value]))} of its maximum` : null;
    return h("li", { "--share": share([feature, value]) },
      h("button", { type: "button", class: explanations[feature] ? "quiet" : "quiet unnamed",
        title: "Where in the text it fires", onclick: () => shade(feature) }, name),
      h("span", { class: "numbers" }, h("a", { href: `report.html#feature=${feature}` }, `#${feature}`),
        h("span", {}, figure(value)), h("span", {}, relative)));
  }

  const button = (text, onclick) => h("button", { type: "button", class: "quiet small", onclick }, text);
  const choose = (event) => {
    const place = event.target.closest(".t")?.dataset.place;
    if (place != null) list(Number(place));
  };
  for (const name of ["click", "focusin"]) $("text").addEventListener(name, choose);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    shade();
    list();
  });
  shade();
  list();
}

run(startText);
