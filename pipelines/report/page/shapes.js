// The shape of a query's influences, in plots and in words: their distribution, their tail, their layers.

/** Draw into a box whenever its width changes. */
function fitted(draw) {
  const box = el("div", { class: "fitted" });
  let last = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && width !== last) box.replaceChildren(draw((last = width)) ?? "");
  }).observe(box);
  return box;
}

function shapes(query, sequences, view) {
  const figures = [];
  if (survivalPoints(query).length)
    figures.push(
      figure(
        "Influences of all scanned sequences",
        (width) => survivalPlot(query, width),
        feedLegend(query),
        "The share of sequences with at least so much influence.",
      ),
    );
  if ((query.tails.share ?? []).length > 1)
    figures.push(
      figure(
        "Where the positive influence is",
        (width) => sharePlot(query.tails.share, width),
        null,
        "The share of all positive influence that the top sequences of the unfiltered feed hold.",
      ),
    );
  if (RECORD.rows.labels.length && sequences.some((sequence) => sequence.rows)) {
    const shares = layerShares(sequences.filter((sequence) => sequence.side === view.side));
    figures.push(
      figure(
        "Layers",
        (width) => layerPlot(shares, width),
        null,
        `Share of the influence of the listed ${view.side} sequences by layer: red raises, teal lowers.`,
      ),
    );
  }
  if (!figures.length) return null;
  return el(
    "details",
    { class: "shapes", open: view.shapes, toggle: (event) => (view.shapes = event.target.open) },
    // The toggle event is late: what is drawn anew right after a click would be as it was before.
    el(
      "summary",
      { click: (event) => (view.shapes = !event.currentTarget.parentElement.open) },
      "Shape of the influences",
    ),
    el("div", { class: "figures" }, figures),
    tailText(query),
  );
}

const figure = (title, draw, key, caption) =>
  el("figure", {}, el("h2", {}, title), key, fitted(draw), el("figcaption", {}, caption));

function feedLegend(query) {
  const curves = survivalPoints(query);
  const laws = curves.some(([feed, points]) => powerLaw(query.tails.feeds?.[feed], points));
  return el(
    "p",
    { class: "keys" },
    curves.map(([feed]) => el("span", { class: `key ${feed}` }, FEEDS[feed] ?? feed)),
    laws ? el("span", { class: "key law" }, "power law") : null,
  );
}

/** The tail in words: the fit, what it means for scanning, what the prefilter missed. */
function tailText(query) {
  const feeds = Object.entries(query.tails.feeds ?? {}).map(([feed, tail]) => [FEEDS[feed] ?? feed, tail]);
  const lines = [
    ...feeds.map(([feed, tail]) => [el("b", {}, feed), ": ", ...tailLine(tail)]),
    neededLine(query.tails.needed),
    recallLine(query.tails.recall),
  ].filter(Boolean);
  const fitted = feeds.filter(([, tail]) => Object.keys(tail.fits ?? {}).length);
  if (!lines.length) return null;
  return el(
    "div",
    { class: "tails" },
    el("ul", {}, ...lines.map((line) => el("li", {}, line))),
    fitted.length
      ? el(
          "details",
          {},
          el("summary", {}, "All fits"),
          el(
            "div",
            { class: "wide" },
            fitted.map(([feed, tail]) => fitTable(feed, tail)),
          ),
        )
      : null,
  );
}

const interval = (ends) => (ends ? ` [${ends.map((end) => number(end)).join(", ")}]` : "");

function tailLine(tail) {
  const counts = `${number(tail.positive)} of ${number(tail.count)} influences are positive. `;
  const fit = tail.fits?.power_law;
  if (!fit?.alpha) return [counts, visible(tail.reason ?? fit?.reason ?? "No tail was fitted.")];
  return [
    counts,
    `The ${number(tail.tail?.n)} strongest, above ${number(fit.xmin)}, have as a power law the exponent `,
    el("b", {}, number(fit.alpha)),
    interval(fit.interval),
    goodness(fit),
    tail.best && tail.best !== "power_law" ? `; ${familyName(tail.best)} describes them better.` : ".",
  ];
}

/** Whether a power law is implausible, as Clauset, Shalizi and Newman judge it: a p-value of at most 0.1. */
const isPoor = (p) => p !== null && p !== undefined && p <= 0.1;

function goodness({ p_value: p, ks, bootstraps }) {
  if (p === null || p === undefined) return "";
  const tested = `Kolmogorov\u2013Smirnov ${number(ks)}, p = ${number(p)} from ${number(bootstraps)} samples`;
  return ` (${tested}${isPoor(p) ? ": a poor fit" : ""})`;
}

/** How many unfiltered sequences hold ten as influential as BM25's tenth; both estimates where the power law is poor. */
function neededLine(needed) {
  if (needed?.reason) return `How many unfiltered sequences should be scanned is not known: ${visible(needed.reason)}`;
  if (!needed?.sequences) return null;
  const { power_law: law, empirical: counted } = needed.estimates ?? {};
  const about = ({ sequences, interval: ends }) => ["about ", el("b", {}, number(Math.round(sequences))), interval(ends)];
  const poor = law && isPoor(needed.p_value);
  const doubt = `the power law, which is a poor fit (p = ${number(needed.p_value)})`;
  return [
    "To meet ten unfiltered sequences as influential as the tenth of BM25, ",
    poor && counted
      ? [about(counted), " by counting, or ", about(law), ` by ${doubt},`]
      : [about(needed), poor ? ` by ${doubt},` : ""],
    " would have to be scanned",
    needed.scanned ? `; ${number(needed.scanned)} were` : "",
    poor && !counted ? ", of which none is" : "",
    ".",
  ];
}

function recallLine(recall) {
  if (recall?.reason) return `What BM25 missed is not known: ${visible(recall.reason)}`;
  const heads = Object.entries(recall ?? {}).map(([count, share]) => `${percent(share)} of the top ${number(+count)}`);
  return heads.length ? `BM25\u2019s candidates hold ${heads.join(", ")} of the unfiltered scan.` : null;
}

const familyName = (family) =>
  ({ gev: "generalised extreme value", lognormal: "log-normal", weibull: "Weibull" })[family] ?? visible(family).replace("_", " ");

function fitTable(feed, tail) {
  const rows = Object.entries(tail.fits).map(([name, fit]) => {
    const versus = tail.comparisons?.[name];
    return el(
      "tr",
      { class: name === tail.best ? "best" : null },
      el("td", {}, familyName(name), name === tail.best ? " (best)" : ""),
      [fit?.loglikelihood, fit?.aic, versus?.loglikelihood_ratio, versus?.p_value].map((value) =>
        el("td", { class: "numeric" }, number(value)),
      ),
    );
  });
  const heads = [feed, "log-likelihood", "AIC", "ratio to power law", "its p"];
  return el(
    "table",
    { class: "fits" },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        heads.map((name, column) => el("th", { class: column ? "numeric" : null }, name)),
      ),
    ),
    el("tbody", {}, rows),
  );
}
