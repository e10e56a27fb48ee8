// Text coloured by influence: red raises what the query measures, teal lowers it.

const KIND_NAMES = {
  update: ["Update", "Eq. 31: the weight update made at each token. The token predicted is the one after it."],
  output: ["As target", "Eq. 36: each token as one that is predicted: its own term of the loss."],
  input: ["As input", "Eq. 38: each token as an input: its embedding."],
};
const REMINDERS = {
  update:
    "The highlighted token is the one before the token predicted: " +
    "if “George” after “President” matters, “President” is coloured.",
  output: "Here the highlighted token is itself the one that is predicted.",
  input: "Here the highlighted token is one that later tokens were predicted from.",
};
const LONG = 320; // units; longer sequences begin as excerpts
const PEAKS = 6; // units that an excerpt is about
const AROUND = 28; // units on either side of each
const GAP = 40; // units that are worth leaving out
const FAINT = 0.02; // of the scale: no colour below
const CLEAR = 0.15; // of the scale: above it a sign of its own says which colour it is

/**
 * The parts of a sequence that are shown: [first, last] of units. An excerpt holds the strongest units, the hits of a
 * search, and what stands around them.
 */
function parts(sequence, values, whole, hits) {
  const count = unitsOf(sequence).length;
  if (whole || count <= LONG || !values) return [[0, count - 1]];
  const strongest = [...values.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, PEAKS);
  const found = [];
  for (const middle of [...strongest, ...hits].sort((a, b) => a - b)) {
    const [first, last] = [Math.max(0, middle - AROUND), Math.min(count - 1, middle + AROUND)];
    const previous = found.at(-1);
    if (previous && first - previous[1] <= GAP) previous[1] = Math.max(previous[1], last);
    else found.push([first, last]);
  }
  if (found[0][0] < GAP) found[0][0] = 0;
  if (count - 1 - found.at(-1)[1] < GAP) found.at(-1)[1] = count - 1;
  return found;
}

/** Numbers of the units that a search hits. */
function hitUnits(sequence, pattern) {
  if (!pattern) return new Set();
  const hits = new Set();
  const units = unitsOf(sequence);
  let unit = 0;
  for (const match of sequence.text.matchAll(pattern)) {
    while (unit < units.length - 1 && units[unit + 1].at <= match.index) unit++;
    for (let next = unit; next < units.length && units[next].at < match.index + match[0].length; next++) hits.add(next);
  }
  return hits;
}

/** A unit's text; a line break that is a token of its own gets a sign, since nothing else of it could be coloured. */
function unitText(unit) {
  return /^\s*\n\s*$/u.test(unit.text) ? unit.text.replace("\n", "\u21b5\n") : visible(unit.text);
}

/** Plain text of the parts, which takes the room that the coloured text will. */
function fillPlain(box, sequence, shown, expand) {
  const units = unitsOf(sequence);
  fillParts(box, shown, units.length, expand, (first, last) => [
    units
      .slice(first, last + 1)
      .map(unitText)
      .join(""),
  ]);
}

/** Coloured text of the parts; `scale` is the influence of full colour. */
function fillHeat(box, sequence, values, scale, shown, hits, expand) {
  const units = unitsOf(sequence);
  fillParts(box, shown, units.length, expand, (first, last) => {
    const spans = [];
    for (let index = first; index <= last; index++) {
      const span = document.createElement("span");
      span.textContent = unitText(units[index]);
      span.dataset.unit = index;
      if (values) paint(span, values[index] / scale);
      if (hits.has(index)) span.classList.add("hit");
      spans.push(span);
    }
    return spans;
  });
}

function paint(span, share) {
  const strength = Math.min(1, Math.abs(share));
  if (!(strength >= FAINT)) return;
  span.className = `${share > 0 ? "pos" : "neg"}${strength >= CLEAR ? " clear" : ""}`;
  span.style.setProperty("--v", strength.toFixed(3));
}

function fillParts(box, shown, count, expand, make) {
  const gap = (units) =>
    el(
      "button",
      { type: "button", class: "gap", title: "Show the whole sequence", click: expand },
      `\u22ef ${units} tokens \u22ef`,
    );
  const children = [];
  let end = -1;
  for (const [first, last] of shown) {
    if (first > end + 1) children.push(gap(first - end - 1));
    children.push(...make(first, last));
    end = last;
  }
  if (end < count - 1) children.push(gap(count - 1 - end));
  box.replaceChildren(...children);
}

/** What a token's influence means, in words. */
function explanation(sequence, kind, index, values) {
  const units = unitsOf(sequence);
  const unit = units[index];
  const next = units[index + 1];
  const quoted = (found) => el("q", {}, found.text === "" ? "\u2205" : visible(found.text.replace("\n", "\u21b5")));
  const tokens = unit.to - unit.from + 1;
  const lines = {
    update: next
      ? ["the update at ", quoted(unit), ", where ", quoted(next), " is predicted"]
      : ["the last token ", quoted(unit), " predicts nothing"],
    output: index ? [quoted(unit), " as the token predicted"] : ["the first token is predicted by nothing"],
    input: [quoted(unit), " as an input of later predictions"],
  };
  const share = sequence.score && kind === "update" ? ` (${percent(values[index] / sequence.score)} of the score)` : "";
  return [
    el("b", { class: values[index] < 0 ? "minus" : "plus" }, number(values[index], true)),
    share,
    el("br"),
    ...lines[kind],
    tokens > 1 ? el("small", {}, ` \u00b7 ${tokens} tokens make this character`) : null,
  ];
}

/** The symmetric scale of colours, with its ends as numbers where they are the same for all. */
function legend(scale) {
  const ends = scale ? [number(-scale, true), number(scale, true)] : ["\u2212max", "+max"];
  const steps = Array.from({ length: 15 }, (_, step) => {
    const cell = el("i");
    paint(cell, (step - 7) / 7);
    return cell;
  });
  return el(
    "div",
    {
      class: "legend",
      role: "img",
      "aria-label": `Colours from ${ends[0]} (teal, dashed underline) to ${ends[1]} (red, solid)`,
    },
    el("span", {}, "lowers ", ends[0]),
    el("span", { class: "ramp" }, steps),
    el("span", {}, ends[1], " raises"),
  );
}
