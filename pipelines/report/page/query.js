// The page of a query: what was asked, the shape of its influences, and the list of sequences.

const ORDERS = {
  rank: ["rank", (a, b) => a.rank - b.rank],
  bm25: ["BM25 score", (a, b) => (b.bm25 ?? -Infinity) - (a.bm25 ?? -Infinity) || a.rank - b.rank],
  sparsity: ["sparsity", (a, b) => (b.sparsity ?? -1) - (a.sparsity ?? -1) || a.rank - b.rank],
  document: [
    "document",
    (a, b) => String(a.document).localeCompare(String(b.document), "en", { numeric: true }) || a.offset - b.offset,
  ],
};
const SIDES = { top: "raise it most", bottom: "lower it most" };

/** Whether a sequence came by a feed; `both` came by two. */
const cameBy = (sequence, feed) =>
  feed === "all" || sequence.feed === feed || (sequence.feed === "both" && feed !== "other");

/** A search, taken literally and without regard to case; null for none. */
const patternOf = (text) => (text ? new RegExp(text.replace(/[\\^$.*+?()[\]{}|/]/gu, "\\$&"), "giu") : null);

/** The sequences that a view lists, in its order. */
function listed(sequences, view) {
  const matches = ({ text, document }) =>
    !view.pattern || [text, String(document ?? "")].some((where) => where.search(view.pattern) >= 0);
  return sequences
    .filter((sequence) => sequence.side === view.side && cameBy(sequence, view.feed) && matches(sequence))
    .sort(ORDERS[view.order][1]);
}

function queryPage(query, sequences, view) {
  const list = el("section", { id: "list", "aria-label": "Sequences" });
  return [
    hero(query),
    shapes(query, sequences, view),
    toolbar(query, sequences, view),
    el("p", { id: "reminder", class: "reminder" }),
    list,
  ];
}

function hero(query) {
  const measured = {
    contrast: "log-probability of the completion minus that of the other",
    sequence_log_probability: "log-probability of prompt and completion",
    log_probability: "log-probability of the completion",
  }[RECORD.measurement];
  const facts = [`${measured}: ${number(query.measured)} nats`];
  if (RECORD.measurement === "log_probability" && query.measured !== null)
    facts.push(`probability ${chance(Math.exp(query.measured))}`);
  if (query.rank) facts.push(`${plural(query.rank, "singular value")}`);
  if (query.fidelity !== null) facts.push(`fidelity ${query.fidelity}`);
  if (query.refinement) facts.push(...refinementFacts(query.refinement));
  if (query.convergence !== null) facts.push(`convergence ${query.convergence}`);
  return el(
    "section",
    { class: "hero query" },
    el("h1", { dir: "auto" }, visible(query.id)),
    el(
      "blockquote",
      { dir: "auto" },
      el("span", { class: "prompt" }, visible(query.prompt)),
      el("b", { class: "completion" }, visible(query.completion)),
      query.contrast !== null
        ? [el("span", { class: "versus" }, " rather than "), el("b", { class: "other" }, visible(query.contrast))]
        : null,
    ),
    el("p", { class: "meta" }, facts.join(" \u00b7 ")),
  );
}

/** How far conjugate gradients got. */
function refinementFacts({ iterations, residual, gain }) {
  const last = gain === null ? "" : `, the last brought ${percent(gain)}`;
  return [`${plural(iterations, "iteration")}${last}`, `relative residual ${number(residual)}`];
}

function toolbar(query, sequences, view) {
  const change = (key) => (value) => setView(key, value, `.toolbar [data-key="${key}"]`);
  const feeds = Object.keys(FEED_NAMES).filter(
    (feed) => feed !== "both" && sequences.some((sequence) => cameBy(sequence, feed)),
  );
  const search = el("input", {
    type: "search",
    id: "search",
    placeholder: "Search texts, ids",
    value: view.search,
    "aria-label": "Search text and documents",
    input: () => {
      view.search = search.value;
      view.pattern = patternOf(view.search);
      showList(query, sequences, view);
    },
  });
  return el(
    "section",
    { class: "toolbar", "aria-label": "What is listed, and how" },
    query.bottom
      ? segmented(
          "Side",
          [
            ["top", `${SIDES.top} (${query.top})`],
            ["bottom", `${SIDES.bottom} (${query.bottom})`],
          ],
          view.side,
          change("side"),
          "side",
        )
      : null,
    RECORD.kinds.length > 1
      ? segmented(
          "Kind of heatmap",
          RECORD.kinds.map((kind) => [kind, ...KIND_NAMES[kind]]),
          view.kind,
          change("kind"),
          "kind",
        )
      : null,
    feeds.length > 1
      ? menu("feed", [["all", "all"], ...feeds.map((feed) => [feed, FEED_NAMES[feed][0]])], view.feed, change("feed"), "feed")
      : null,
    menu(
      "sort",
      Object.entries(ORDERS).map(([key, [name]]) => [key, name]),
      view.order,
      change("order"),
      "order",
    ),
    RECORD.kinds.length
      ? menu(
          "colour",
          [
            ["own", "own scale"],
            ["shared", "one for all"],
          ],
          view.scale,
          change("scale"),
          "scale",
        )
      : null,
    RECORD.kinds.length
      ? menu(
          "show",
          [
            ["", "excerpts"],
            ["whole", "whole texts"],
          ],
          view.whole ? "whole" : "",
          (value) => change("whole")(value === "whole"),
          "whole",
        )
      : null,
    search,
    el("output", { id: "count", for: "search" }),
  );
}

/** Fill the list anew; the rest of the page stays. */
function showList(query, sequences, view) {
  forgetCards();
  hideTip();
  const found = listed(sequences, view);
  view.strongest = Math.max(
    ...sequences.filter(({ side }) => side === view.side).map(({ score }) => Math.abs(score)),
    1e-300,
  );
  view.peak = Math.max(...found.map((sequence) => sequence.peaks?.[view.kind] ?? 0), 0);
  const all = view.side === "top" ? query.top : query.bottom;
  byId("count").textContent = found.length === all ? plural(all, "sequence") : `${found.length} of ${all} sequences`;
  byId("reminder").replaceChildren(
    ...(RECORD.kinds.length
      ? [
          legend(view.scale === "shared" ? view.peak : null),
          el("span", {}, REMINDERS[view.kind]),
          doubt(query, view.kind),
        ]
      : []),
  );
  byId("list").replaceChildren(
    ...(found.length
      ? found.map((sequence) => sequenceCard(sequence, view))
      : [
          el(
            "p",
            { class: "nothing" },
            "No sequence is listed. ",
            el("button", { type: "button", click: () => clearFilters(view) }, "Clear search and filter"),
          ),
        ]),
  );
  stateScales();
}

/** How far the two kinds that are finite differences can be trusted. */
function doubt(query, kind) {
  const change = query.steps[kind];
  if (change === null || change === undefined) return "";
  const rough = RECORD.tolerance !== null && change > RECORD.tolerance;
  const text = `A finite difference: another step changes it by ${percent(change)}${rough ? ", so it is rough." : "."}`;
  return el("span", { class: rough ? "rough" : null }, text);
}

function clearFilters(view) {
  Object.assign(view, { search: "", pattern: null, feed: "all" });
  show();
}
