// ---- the report: its features are in the page, in chunks ----

/** A chunk of features, which may still be on its way into the page. */
async function chunk(number) {
  const isWhole = () => $(`chunk-${number}`)?.nextElementSibling;
  while (!isWhole() && document.readyState === "loading") await new Promise((resolve) => setTimeout(resolve, 30));
  if (!isWhole()) throw new Error("The file is cut short: copy it again, or have explain.py write it again.");
  return unpack($(`chunk-${number}`).textContent);
}

/** What the view of a feature shows; those that come after the records in the index have none. */
async function recordOf(i) {
  const size = state.index.chunk;
  return i < state.index.records ? (await chunk(Math.floor(i / size)))[i % size] : null;
}

/** Show what the address asks for. */
function route() {
  const wanted = /^#feature=(\d+)$/.exec(location.hash);
  return wanted ? openFeature(Number(wanted[1])) : leaveFeature(location.hash === "#features" ? "features" : "run");
}

run(async () => startList(await unpack($("index").textContent)));
