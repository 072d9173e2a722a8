// ---- the page of a text ----

run(async () => {
  const { tokens, explanations, maxima, fires_on } = await unpack($("text-data").textContent);
  showText(tokens, {
    maximum: (feature) => maxima[feature],
    name: (feature) => explanations[feature] ? words(explanations[feature])
      : fires_on[feature] ? h("span", { class: "unnamed" }, "fires on ", chips(fires_on[feature].slice(0, 3))) : null,
    href: (feature) => `report.html#feature=${feature}`,
  });
});
