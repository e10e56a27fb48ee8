// Plots, drawn to the width they are given so that their text keeps its size.

const FEEDS = { unfiltered: "unfiltered", bm25: "BM25" };
const HEIGHT = 180;
const FLAT = 0.8; // of the largest share: what is above it counts as flat
const MARGIN = { top: 10, right: 14, bottom: 34, left: 46 };

const logOf = Math.log10;
const steps = (low, high, most) => {
  const stride = Math.max(1, Math.ceil((high - low + 1) / most));
  return Array.from({ length: Math.floor((high - low) / stride) + 1 }, (_, index) => low + index * stride);
};

/** Ticks of a logarithmic axis, given its ends as powers: those of ten, and where there are few 2 and 5 times them. */
function ticks(left, right) {
  const powers = steps(Math.floor(left), Math.ceil(right), Infinity).map((power) => 10 ** power);
  const inside = (value) => logOf(value) >= left && logOf(value) <= right;
  const found = powers.filter(inside);
  if (found.length > 5) return found.filter((_, index) => index % Math.ceil(found.length / 5) === 0);
  return found.length > 2 ? found : powers.flatMap((power) => [power, 2 * power, 5 * power]).filter(inside);
}

/** A line through points of the plane, as a path. */
const path = (points) => points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** Points of the survival function that a logarithm can show: [[influence, share]] by feed. */
function survivalPoints(query) {
  return Object.entries(query.survival)
    .map(([feed, [influences, shares]]) => [
      feed,
      influences.map((influence, index) => [influence, shares[index]]).filter(([x, y]) => x > 0 && y > 0),
    ])
    .filter(([, points]) => points.length > 1);
}

/** The same without the left, where no curve falls yet: most of the axis, which says nothing of the tail. */
function fallingPoints(query) {
  const curves = survivalPoints(query);
  const flat = curves.map(([, points]) => {
    const most = Math.max(...points.map(([, share]) => share));
    return Math.max(...points.filter(([, share]) => share >= FLAT * most).map(([influence]) => influence));
  });
  const from = Math.min(...flat);
  return curves
    .map(([feed, points]) => [feed, points.filter(([influence]) => influence >= from)])
    .filter(([, points]) => points.length > 1);
}

/** The power law that was fitted to a tail: two ends of a straight line; null without a fit. */
function powerLaw(tail, points) {
  const fit = tail?.fits?.power_law;
  if (!fit?.alpha || !fit.xmin || !tail.tail?.n || !tail.count) return null;
  const last = points.at(-1)[0] > points[0][0] ? points.at(-1)[0] : points[0][0];
  const share = (x) => (tail.tail.n / tail.count) * (x / fit.xmin) ** (1 - fit.alpha);
  return last > fit.xmin
    ? [
        [fit.xmin, share(fit.xmin)],
        [last, share(last)],
      ]
    : null;
}

function scales(all, width, height, margin) {
  const xs = all.map(([x]) => logOf(x));
  const ys = all.map(([, y]) => logOf(y));
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const low = Math.floor(Math.min(...ys));
  const span = right - left || 1;
  return {
    left,
    right,
    low,
    x: (value) => margin.left + ((logOf(value) - left) / span) * (width - margin.left - margin.right),
    y: (value) => margin.top + (logOf(value) / (low || -1)) * (height - margin.top - margin.bottom),
  };
}

/** Which share of a feed has at least so much influence: both axes logarithmic, with the power law of the tail. */
function survivalPlot(query, width, height = HEIGHT) {
  const curves = fallingPoints(query);
  if (!curves.length) return null;
  const { x, y, left, right, low } = scales(
    curves.flatMap(([, points]) => points),
    width,
    height,
    MARGIN,
  );
  const bottom = height - MARGIN.bottom;
  const drawing = svg("svg", {
    class: "plot",
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    role: "img",
    "aria-label": "Survival function of influences",
  });
  for (const power of steps(low, 0, 6)) drawing.append(...yTick(width, y(10 ** power), `10${superscript(power)}`));
  for (const value of ticks(left, right)) {
    const power = logOf(value);
    const plain = Math.abs(power) < 4 || !Number.isInteger(power);
    drawing.append(...xTick(x(value), bottom, plain ? number(value) : `10${superscript(power)}`));
  }
  for (const [feed, points] of curves) {
    drawing.append(svg("path", { class: `curve ${feed}`, d: path(points.map(([a, b]) => [x(a), y(b)])) }));
    const law = powerLaw(query.tails.feeds?.[feed], points);
    if (law)
      drawing.append(
        svg("path", { class: `law ${feed}`, d: path(clipped(law, 10 ** low).map(([a, b]) => [x(a), y(b)])) }),
      );
  }
  drawing.append(axisName(width, height, "influence at least"));
  return drawing;
}

/** A falling straight line (in logarithms) cut off where it leaves the plot at the bottom. */
function clipped([start, end], floor) {
  if (end[1] >= floor) return [start, end];
  const slope = (logOf(end[1]) - logOf(start[1])) / (logOf(end[0]) - logOf(start[0]));
  return [start, [10 ** (logOf(start[0]) + (logOf(floor) - logOf(start[1])) / slope), floor]];
}

/** The same in a table's cell. */
function survivalSpark(query, width = 96, height = 30) {
  const curves = fallingPoints(query);
  if (!curves.length) return null;
  const { x, y } = scales(
    curves.flatMap(([, points]) => points),
    width,
    height,
    { top: 2, right: 2, bottom: 2, left: 2 },
  );
  return svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" },
    curves.map(([feed, points]) =>
      svg("path", { class: `curve ${feed}`, d: path(points.map(([a, b]) => [x(a), y(b)])) }),
    ),
  );
}

/** Which share of the total positive influence the top p % of sequences hold. */
function sharePlot(points, width, height = HEIGHT) {
  const kept = points.filter(([p, share]) => p > 0 && share !== null);
  if (kept.length < 2) return null;
  const [low, high] = [logOf(kept[0][0]), logOf(kept.at(-1)[0])];
  const x = (p) => MARGIN.left + ((logOf(p) - low) / (high - low || 1)) * (width - MARGIN.left - MARGIN.right);
  const bottom = height - MARGIN.bottom;
  const y = (share) => bottom - share * (bottom - MARGIN.top);
  const drawing = svg("svg", {
    class: "plot",
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    role: "img",
    "aria-label": "Share of positive influence that the top sequences hold",
  });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) drawing.append(...yTick(width, y(share), `${share * 100}\u00a0%`));
  for (const power of steps(Math.ceil(low), Math.floor(high), 5))
    drawing.append(...xTick(x(10 ** power), bottom, `${number(10 ** power)}\u00a0%`));
  drawing.append(
    svg("path", { class: "curve unfiltered", d: path(kept.map(([p, share]) => [x(p), y(share)])) }),
    axisName(width, height, "top sequences"),
  );
  return drawing;
}

/** A bar a layer, what raises above the line and what lowers below it; layers of a group stand together. */
function layerPlot(shares, width, height = HEIGHT) {
  const top = Math.max(...shares.map(({ plus }) => plus));
  const below = Math.max(...shares.map(({ minus }) => minus));
  if (!(top + below > 0)) return null;
  const groups = rowGroups();
  const gap = groups.length > 1 ? Math.min(8, 60 / groups.length) : 0;
  const bar = (width - MARGIN.left - MARGIN.right - gap * (groups.length - 1)) / shares.length;
  const bottom = height - MARGIN.bottom;
  const unit = (bottom - MARGIN.top) / (top + below);
  const zero = MARGIN.top + top * unit;
  const drawing = svg("svg", {
    class: "plot",
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    role: "img",
    "aria-label": "Influence by layer",
  });
  for (const share of [top, -below].filter((value) => Math.abs(value) * unit > 14))
    drawing.append(...yTick(width, zero - share * unit, percent(Math.abs(share))));
  drawing.append(...yTick(width, zero, "0"));
  const every = Math.ceil(groups.length / Math.max(1, Math.floor((width - 60) / 34)));
  groups.forEach(({ name, first, last }, index) => {
    const left = MARGIN.left + first * bar + index * gap;
    shares.slice(first, last + 1).forEach(({ label, plus, minus }, offset) => {
      const title = svg("title", {}, `${label}\nraises ${percent(plus)}, lowers ${percent(minus)}`);
      const at = left + offset * bar;
      const wide = Math.max(0.5, bar - (bar > 4 ? 1 : 0));
      drawing.append(
        svg(
          "g",
          {},
          title,
          svg("rect", { class: "raises", x: at, width: wide, y: zero - plus * unit, height: plus * unit }),
          svg("rect", { class: "lowers", x: at, width: wide, y: zero, height: minus * unit }),
        ),
      );
    });
    if (index % every === 0)
      drawing.append(
        svg(
          "text",
          { x: left + ((last - first + 1) * bar) / 2, y: bottom + 14, "text-anchor": "middle" },
          shortName(name),
        ),
      );
  });
  drawing.append(axisName(width, height, "layers, first to last"));
  return drawing;
}

const shortName = (name) =>
  visible(name)
    .replace(/^block\s+/u, "")
    .slice(0, 9);

function yTick(width, y, text) {
  return [
    svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
    svg("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, text),
  ];
}

function xTick(x, bottom, text) {
  return [
    svg("line", { class: "tick", x1: x, x2: x, y1: bottom, y2: bottom + 4 }),
    svg("text", { x, y: bottom + 16, "text-anchor": "middle" }, text),
  ];
}

const axisName = (width, height, text) =>
  svg(
    "text",
    { class: "axis", x: (width + MARGIN.left - MARGIN.right) / 2, y: height - 3, "text-anchor": "middle" },
    text,
  );
