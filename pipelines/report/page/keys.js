// The keyboard, and the list of its keys.

const KEYS = [
  ["j", "k", "next, previous sequence", (key) => step(key === "j" ? 1 : -1)],
  [".", ",", "next, previous token of the sequence, with its influence", (key) => stepToken(key === "." ? 1 : -1)],
  ["]", "[", "next, previous query", (key) => stepQuery(key === "]" ? 1 : -1)],
  [
    "1",
    "2",
    "3",
    "heatmap: update, token as target, token as input",
    (key) => pick("kind", RECORD.kinds[Number(key) - 1]),
  ],
  ["l", "layers of the sequence", () => press("layers")],
  ["c", "text around the sequence", () => press("around")],
  ["e", "whole sequences, or excerpts", () => pick("whole", !state.view?.whole)],
  [
    "b",
    "what raises it most, or what lowers it most",
    () => pick("side", state.view?.side === "top" ? "bottom" : "top"),
  ],
  [
    "s",
    "next way to sort",
    () =>
      pick(
        "order",
        Object.keys(ORDERS)[(Object.keys(ORDERS).indexOf(state.view?.order) + 1) % Object.keys(ORDERS).length],
      ),
  ],
  ["/", "search", () => byId("search")?.focus()],
  ["o", "overview", () => (location.hash = "")],
  ["t", "light, dark, or as the system", nextTheme],
  ["?", "these keys", toggleHelp],
];

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return escape(event);
  if (event.target.closest("input, select, textarea") || byId("help").open) {
    if (event.key === "?" && byId("help").open) toggleHelp();
    return;
  }
  const found = KEYS.find((row) => row.slice(0, -2).includes(event.key));
  if (!found) return;
  event.preventDefault();
  found.at(-1)(event.key);
}

/** Out of the search, away with the hint. */
function escape(event) {
  hideTip();
  if (event.target.id !== "search") return;
  if (event.target.value) {
    event.target.value = "";
    event.target.dispatchEvent(new Event("input"));
  } else event.target.blur();
}

function pick(key, value) {
  const { view, query } = state;
  if (!view || value === undefined || (key === "side" && !query.bottom)) return;
  setView(key, value);
}

const currentCard = () => document.querySelector(".card.current");

/** Go to another sequence of the list; the address follows, so that it can be copied. */
function step(by) {
  const all = [...cards.keys()];
  const at = all.indexOf(currentCard());
  const card = all[at < 0 ? (by > 0 ? 0 : all.length - 1) : Math.min(all.length - 1, Math.max(0, at + by))];
  if (!card) return;
  history.replaceState(null, "", linkTo(state.query, cards.get(card).sequence));
  select(card);
}

/** Mark a card as the current one and bring it into the window. */
function select(card) {
  currentCard()?.classList.remove("current");
  card.classList.add("current");
  hideTip();
  fill(card);
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "start" });
  // Cards above that were never drawn have the height that was guessed for them until now.
  requestAnimationFrame(() => card.scrollIntoView({ block: "start" }));
}

function stepToken(by) {
  const card = currentCard() ?? [...cards.keys()][0];
  if (!card) return;
  if (card !== currentCard()) select(card);
  const spans = [...card.querySelectorAll("[data-unit]")];
  const at = spans.findIndex((span) => span.classList.contains("spot"));
  const span = spans[at < 0 ? (by > 0 ? 0 : spans.length - 1) : Math.min(spans.length - 1, Math.max(0, at + by))];
  if (!span) return;
  span.scrollIntoView({ block: "nearest" });
  showTip(span);
}

function stepQuery(by) {
  const queries = RECORD.queries;
  const next = state.query ? queries[state.query.number + by] : queries[by > 0 ? 0 : queries.length - 1];
  if (next) location.hash = linkTo(next);
}

function press(does) {
  const card = currentCard() ?? [...cards.keys()][0];
  if (!card) return;
  if (card !== currentCard()) select(card);
  card.querySelector(`[data-does="${does}"]`)?.click();
}

function toggleHelp() {
  const help = byId("help");
  if (help.open) return help.close();
  const rows = KEYS.map((row) =>
    el(
      "tr",
      {},
      el(
        "td",
        {},
        row.slice(0, -2).map((key) => el("kbd", {}, key)),
      ),
      el("td", {}, row.at(-2)),
    ),
  );
  help.replaceChildren(
    el("h2", {}, "Keys"),
    el(
      "table",
      {},
      el(
        "tbody",
        {},
        rows,
        el("tr", {}, el("td", {}, el("kbd", {}, "Esc")), el("td", {}, "out of the search; away with this")),
      ),
    ),
    el("form", { method: "dialog" }, el("button", { autofocus: true }, "Close")),
  );
  help.showModal();
  return undefined;
}

// The hint at a token: its influence, and what is predicted there.

let tipped = null; // the token that the hint is about

function showTip(span) {
  const entry = cards.get(span.closest(".card"));
  if (!entry?.values) return;
  hideTip();
  tipped = span;
  span.classList.add("spot");
  const lines = explanation(entry.sequence, entry.view.kind, Number(span.dataset.unit), entry.values);
  byId("tip").replaceChildren(...lines.filter(Boolean));
  byId("tip").hidden = false;
  placeTip();
}

/** Put the hint above its token, or below where there is no room; it follows when the page scrolls. */
function placeTip() {
  if (!tipped) return;
  const tip = byId("tip");
  const frame = tipped.getClientRects()[0] ?? tipped.getBoundingClientRect();
  const left = Math.max(8, Math.min(frame.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const above = frame.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : frame.bottom + 8}px`;
}

function hideTip() {
  byId("tip").hidden = true;
  tipped?.classList.remove("spot");
  tipped = null;
}

function pointed(event) {
  const span = event.target.closest?.("[data-unit]");
  if (span) showTip(span);
  else if (!event.target.closest?.("#tip")) hideTip();
}
