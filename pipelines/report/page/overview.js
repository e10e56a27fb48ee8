// The first page: what was run on what, and the table of queries.

const COLUMNS = [
  {
    key: "number",
    name: "#",
    value: (query) => query.number,
    cell: (query) => String(query.number + 1),
    numeric: true,
  },
  { key: "query", name: "query", value: (query) => query.id, cell: queryCell },
  {
    key: "measured",
    name: "measured",
    hint: "Value of the measurement under the model, in nats",
    numeric: true,
    value: (query) => query.measured,
    cell: (query) => number(query.measured),
  },
  {
    key: "highest",
    name: "highest influence",
    hint: "Score of the first sequence",
    numeric: true,
    value: (query) => query.highest,
    cell: (query) => number(query.highest),
  },
  {
    key: "tail",
    name: "tail",
    hint: "Survival function of the influences, both axes logarithmic; exponent of the power law of its tail",
    numeric: true,
    there: () => RECORD.queries.some((query) => Object.keys(query.survival).length),
    value: (query) => lawOf(query)?.alpha,
    cell: tailCell,
  },
  {
    key: "fidelity",
    name: "fidelity",
    hint: "Correlation with the scores of full rank, on a sample",
    numeric: true,
    there: () => RECORD.queries.some((query) => query.fidelity !== null),
    value: (query) => Number(query.fidelity),
    cell: (query) => query.fidelity ?? "–",
  },
  {
    key: "convergence",
    name: "convergence",
    hint: "Correlation with the scores that factors of another sample would give, extrapolated from smaller samples",
    numeric: true,
    there: () => RECORD.queries.some((query) => query.convergence !== null),
    value: (query) => (query.convergence === null ? null : Number(query.convergence)),
    cell: (query) => query.convergence ?? "–",
  },
  {
    key: "spurious",
    name: "marked",
    hint: "Top sequences whose influence sits in so few tokens that it may be spurious",
    numeric: true,
    there: () => RECORD.queries.some((query) => query.attributed),
    value: (query) => query.spurious,
    cell: (query) => String(query.spurious),
  },
];

/** The power law of the unfiltered feed's tail; of BM25's where there is no other. */
function lawOf(query) {
  const { unfiltered, bm25 } = query.tails.feeds ?? {};
  return [unfiltered, bm25].map((tail) => tail?.fits?.power_law).find((fit) => fit?.alpha) ?? null;
}

function queryCell(query) {
  return [
    el("a", { class: "query-link", href: linkTo(query) }, oneLine(query.id)),
    el("span", { class: "saying", dir: "auto" }, oneLine(query.prompt), " ", el("b", {}, oneLine(query.completion))),
  ];
}

function tailCell(query) {
  const law = lawOf(query);
  const text = law ? `\u03b1 ${law.alpha.toFixed(2)}` : "no fit";
  const poor = isPoor(law?.p_value) ? el("span", { class: "rough" }, "poor fit") : null;
  return el("span", { class: "law-of" }, survivalSpark(query), el("small", {}, text, poor));
}

function overviewPage(state) {
  const marks = RECORD.queries.some((query) => query.attributed);
  const most = Math.max(0, ...RECORD.queries.map((query) => query.top));
  return [
    el(
      "section",
      { class: "hero" },
      el("h1", { dir: "auto" }, visible(RECORD.title)),
      el(
        "p",
        { class: "lead" },
        plural(RECORD.queries.length, "query", "queries"),
        `, the ${most} training sequences with the highest influence on each. `,
        "Positive influence: training on the sequence raises what the query measures.",
      ),
      marks ? legend(null) : null,
    ),
    el("section", { "aria-label": "Queries" }, queryTable(state)),
    el(
      "section",
      { class: "columns" },
      el("div", {}, el("h2", {}, "The run"), factList(RECORD.facts)),
      el(
        "div",
        {},
        el("h2", {}, "What a score means"),
        el("p", {}, unitSentence()),
        el("h2", {}, "Stages"),
        stageTable(),
        RECORD.notes.length
          ? [
              el("h2", {}, "About this page"),
              el(
                "ul",
                { class: "notes" },
                RECORD.notes.map((note) => el("li", {}, note)),
              ),
            ]
          : null,
      ),
    ),
  ];
}

function unitSentence() {
  const sequences = RECORD.corpus_sequences;
  return `A score is the ${RECORD.unit}. Here N is ${sequences.toLocaleString("en")}.`;
}

function factList(facts) {
  return el(
    "dl",
    { class: "facts" },
    facts.map(([name, text]) => {
      const [first, ...more] = String(text).split("\n");
      const rest = more.length
        ? el("details", {}, el("summary", {}, "more"), el("p", {}, visible(more.join("\n"))))
        : null;
      return [el("dt", {}, visible(name)), el("dd", { dir: "auto" }, visible(first), rest)];
    }),
  );
}

function stageTable() {
  const longest = Math.max(...RECORD.stages.map((stage) => stage.seconds), 1e-9);
  return el(
    "table",
    { class: "stages" },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        ["stage", "", "time when computed", "tokens/s"].map((name, column) =>
          el("th", { class: column > 1 ? "numeric" : null }, name),
        ),
      ),
    ),
    el(
      "tbody",
      {},
      RECORD.stages.map((stage) => {
        const bar = el("i", { class: "bar" });
        bar.style.width = `${(stage.seconds / longest) * 100}%`;
        return el(
          "tr",
          {},
          el("td", {}, visible(stage.name), stage.cached ? el("small", {}, " cached") : null),
          el("td", { class: "timed", "aria-hidden": "true" }, bar),
          el("td", { class: "numeric" }, stage.time),
          el("td", { class: "numeric" }, stage.rate),
        );
      }),
    ),
  );
}

/** The queries, sorted by the column whose head was pressed; a second press turns the order round. */
function queryTable(state) {
  const columns = COLUMNS.filter((column) => column.there?.() ?? true);
  const [key, down] = state.queryOrder;
  const by = columns.find((column) => column.key === key) ?? columns[0];
  const order = RECORD.queries.toSorted((a, b) => compare(by.value(a), by.value(b), down) || a.number - b.number);
  const heads = columns.map((column) =>
    el(
      "th",
      {
        scope: "col",
        class: column.numeric ? "numeric" : null,
        "aria-sort": column === by ? (down ? "descending" : "ascending") : null,
      },
      el(
        "button",
        {
          type: "button",
          title: column.hint,
          click: () => {
            state.queryOrder = [column.key, column === by ? !down : column.key !== "number" && column.key !== "query"];
            show({ focus: `th[data-key="${column.key}"] button` });
          },
        },
        column.name,
        el("span", { class: "arrow", "aria-hidden": "true" }, column === by ? (down ? " \u2193" : " \u2191") : ""),
      ),
    ),
  );
  heads.forEach((head, index) => (head.dataset.key = columns[index].key));
  const rows = order.map((query) =>
    el(
      "tr",
      { click: (event) => event.target.closest("a") ?? (location.hash = linkTo(query)) },
      columns.map((column) =>
        el(
          "td",
          { class: `${column.key}${column.numeric ? " numeric" : ""}`, "data-name": column.name },
          column.cell(query),
        ),
      ),
    ),
  );
  return el(
    "div",
    { class: "wide" },
    el("table", { class: "queries" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows)),
  );
}

/** Order of two values; what is missing comes last either way. */
function compare(a, b, down) {
  const missing = (value) => value === null || value === undefined || Number.isNaN(value);
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const sign = typeof a === "string" ? a.localeCompare(b) : a - b;
  return down ? -sign : sign;
}
