// Which page is shown: the address says so (#q=QUERY&s=SEQUENCE), so that every sequence has a permanent link.

const THEMES = ["system", "light", "dark"];
const state = { query: null, view: null, queryOrder: ["number", false], theme: "system" };

RECORD.queries.forEach((query, number) => (query.number = number));

/** The address of a query, or of one of its sequences. */
function linkTo(query, sequence = null) {
  const parts = new URLSearchParams({ q: query.id.toWellFormed() });
  if (query !== RECORD.queries.find((other) => other.id.toWellFormed() === query.id.toWellFormed()))
    parts.set("n", query.number);
  if (sequence) parts.set("s", sequence.id);
  if (sequence?.side === "bottom") parts.set("side", "bottom");
  return `#${parts}`;
}

/** What an address asks for; a query that is not here is none. */
function asked(hash) {
  const parts = new URLSearchParams(hash.replace(/^#/u, ""));
  if (!parts.has("q")) return { query: null };
  const query = parts.has("n")
    ? RECORD.queries[Number(parts.get("n"))]
    : RECORD.queries.find(({ id }) => id.toWellFormed() === parts.get("q"));
  const sequence = parts.has("s") ? Number(parts.get("s")) : null;
  return {
    query: query ?? null,
    missing: query ? null : parts.get("q"),
    sequence,
    side: parts.get("side") === "bottom" ? "bottom" : "top",
  };
}

const newView = () => ({
  side: "top",
  kind: RECORD.kinds[0] ?? "update",
  feed: "all",
  order: "rank",
  scale: "own",
  search: "",
  pattern: null,
  whole: false,
  shapes: window.innerWidth > 700,
});

/** Follow the address. */
async function follow() {
  const { query, missing, sequence, side } = asked(location.hash);
  const changed = query !== state.query || !query;
  if (changed)
    state.view = query && { ...newView(), kind: state.view?.kind ?? newView().kind, whole: state.view?.whole ?? false };
  state.query = query;
  if (query && sequence !== null) {
    // A link wins over filters that would hide what it leads to.
    const here = (await sequencesOf(query.number)).find((item) => item.id === sequence && item.side === side);
    if (here && !listed([here], state.view).length)
      Object.assign(state.view, newView(), { side, kind: state.view.kind });
  }
  if (changed || (sequence !== null && !cardOf(sequence, side))) await show({ missing });
  if (changed) window.scrollTo(0, 0);
  if (!query || sequence === null) return;
  const card = cardOf(sequence, side);
  if (card) select(card);
  else notice(`Sequence ${sequence} is not among those shown for this query.`);
}

const cardOf = (id, side) => [...cards].find(([, { sequence }]) => sequence.id === id && sequence.side === side)?.[0];

const LOOKS = new Set(["kind", "scale", "whole"]); // settings of a view that change how sequences look, not which

/** Change a setting of the view. Whoever only looks at the same sequences differently stays where they are. */
function setView(key, value, focus = null) {
  state.view[key] = value;
  show({ focus, place: LOOKS.has(key) ? placeNow() : null });
}

/** Draw the page of the state. */
async function show({ missing = null, focus = null, place = null } = {}) {
  const { query, view } = state;
  hideTip();
  showBar();
  document.title = query ? `${oneLine(query.id)} \u00b7 ${oneLine(RECORD.title)}` : oneLine(RECORD.title);
  if (!query) {
    forgetCards();
    byId("main").replaceChildren(...overviewPage(state));
    if (missing) notice(`This report has no query \u201c${oneLine(missing)}\u201d.`);
  } else {
    const sequences = await sequencesOf(query.number);
    if (state.query !== query) return; // another page was asked for meanwhile
    byId("main").replaceChildren(...queryPage(query, sequences, view).filter(Boolean));
    showList(query, sequences, view);
  }
  if (place) backTo(place);
  if (focus) document.querySelector(focus)?.focus({ preventScroll: true });
}

function notice(text) {
  byId("main").prepend(el("p", { class: "notice", role: "alert" }, text));
}

function showBar() {
  const { query } = state;
  const choose = el(
    "select",
    {
      "aria-label": "Query",
      change: () => (location.hash = choose.value === "" ? "" : linkTo(RECORD.queries[Number(choose.value)])),
    },
    el("option", { value: "", selected: !query }, "Overview"),
    RECORD.queries.map((other) =>
      el("option", { value: other.number, selected: other === query }, `${other.number + 1}. ${oneLine(other.id)}`),
    ),
  );
  const turn = (by, label, sign) =>
    el(
      "button",
      {
        type: "button",
        title: label,
        "aria-label": label,
        disabled: !(query ? RECORD.queries[query.number + by] : by > 0 && RECORD.queries.length),
        click: () => stepQuery(by),
      },
      sign,
    );
  byId("bar").replaceChildren(
    el("a", { class: "home", href: "#", title: "Overview (o)" }, "whence"),
    el(
      "nav",
      { "aria-label": "Queries" },
      turn(-1, "Previous query ([)", "\u2039"),
      choose,
      turn(1, "Next query (])", "\u203a"),
    ),
    el(
      "span",
      { class: "tools" },
      el(
        "button",
        {
          type: "button",
          title: `Theme: ${state.theme}. Light, dark, or as the system (t)`,
          "aria-label": `Theme: ${state.theme}`,
          click: nextTheme,
        },
        "\u25d0",
        el("span", { class: "word" }, ` ${state.theme}`),
      ),
      el("button", { type: "button", title: "Keys (?)", "aria-label": "Keys", click: toggleHelp }, "?"),
    ),
  );
}

function nextTheme() {
  state.theme = THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length];
  if (state.theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  showBar();
  repaintMaps();
}

const repaintMaps = () => document.querySelectorAll("canvas").forEach((canvas) => canvas.redraw?.());

document.addEventListener("keydown", pressed);
document.addEventListener("pointerover", pointed);
document.addEventListener("click", pointed);
document.addEventListener("scroll", placeTip, { passive: true });
window.addEventListener("hashchange", follow);
window.addEventListener("beforeprint", fillAll);
window.addEventListener("resize", repaintMaps);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaintMaps);
await follow();
document.documentElement.dataset.ready = "true";
