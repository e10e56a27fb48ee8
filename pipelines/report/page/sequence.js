// One sequence: its numbers, its text, and on demand its layers and what stands around it.

const FEED_NAMES = {
  bm25: ["BM25", "proposed by BM25 for this query"],
  unfiltered: ["unfiltered", "from the unfiltered feed"],
  both: ["both feeds", "from the unfiltered feed, and proposed by BM25 for this query"],
  other: ["other", "proposed by BM25 for another query, and scored for this one too"],
};
const cards = new Map(); // element -> what `fill` needs

const WAIT = []; // cards that came near the window and are not coloured yet
const SLICE = 6; // milliseconds of a frame that colouring may take, so that scrolling stays smooth

const near = new IntersectionObserver(
  (entries) => {
    if (!WAIT.length) requestAnimationFrame(fillWaiting);
    WAIT.push(...entries.filter(({ isIntersecting }) => isIntersecting).map(({ target }) => target));
  },
  { rootMargin: "1200px 0px" },
);

function fillWaiting() {
  const ending = performance.now() + SLICE;
  do fill(WAIT.shift());
  while (WAIT.length && performance.now() < ending);
  if (WAIT.length) requestAnimationFrame(fillWaiting);
}

/** A card. Its text is plain until it comes near the window, and takes the same room. */
function sequenceCard(sequence, view) {
  const text = el("p", { class: "text", dir: "auto" });
  const card = el(
    "article",
    { class: `card${sequence.spurious ? " spurious" : ""}`, tabindex: "-1", "aria-label": `Rank ${sequence.rank}` },
    cardHead(sequence, view),
    text,
  );
  const hits = hitUnits(sequence, view.pattern);
  const entry = { sequence, view, text, hits, open: { layers: null, around: null }, filled: false };
  cards.set(card, entry);
  card.append(cardFoot(card, entry));
  arrange(card, entry);
  near.observe(card);
  return card;
}

function arrange(card, entry) {
  const { sequence, view, hits } = entry;
  entry.values = unitValues(sequence, view.kind);
  entry.shown = parts(sequence, entry.values, view.whole || entry.whole, hits);
  entry.expand = () => {
    entry.whole = true;
    arrange(card, entry);
    fill(card, true);
  };
  fillPlain(entry.text, sequence, entry.shown, entry.expand);
}

/** Colour a card's text. */
function fill(card, again = false) {
  const entry = cards.get(card);
  if (!entry || (entry.filled && !again)) return;
  entry.filled = true;
  near.unobserve(card);
  fillHeat(entry.text, entry.sequence, entry.values, scaleOf(entry), entry.shown, entry.hits, entry.expand);
}

const fillAll = () => [...cards.keys()].forEach((card) => fill(card));

/** What a reader has before them: where each card is in the window, what is open in it, and which is the current one. */
function placeNow() {
  const places = [...cards].map(([card, { sequence, open }]) => {
    const { top, bottom, height } = card.getBoundingClientRect();
    return { key: keyOf(sequence), current: card === currentCard(), open, top, bottom, height };
  });
  const inWindow = places.filter(({ top, bottom }) => bottom > 60 && top < window.innerHeight);
  return { places, anchor: inWindow.find(({ current }) => current) ?? inWindow[0] };
}

/** Put a list that was drawn anew where it was; a card that is not drawn yet takes the room that it took. */
function backTo({ places, anchor }) {
  const found = new Map([...cards].map(([card, { sequence }]) => [keyOf(sequence), card]));
  for (const { key, current, open, height } of places) {
    const card = found.get(key);
    if (!card) continue;
    const { paddingTop, paddingBottom, borderTopWidth, borderBottomWidth } = getComputedStyle(card);
    const edges = [paddingTop, paddingBottom, borderTopWidth, borderBottomWidth].map(parseFloat);
    card.style.containIntrinsicBlockSize = `auto ${edges.reduce((left, edge) => left - edge, height)}px`;
    card.classList.toggle("current", current);
    for (const [does, nodes] of Object.entries(open))
      if (nodes) card.querySelector(`[data-does="${does}"]`)?.click();
  }
  const card = anchor && found.get(anchor.key);
  if (!card) return;
  const settle = () => window.scrollBy(0, card.getBoundingClientRect().top - anchor.top);
  settle();
  requestAnimationFrame(settle);
}

function forgetCards() {
  near.disconnect();
  WAIT.length = 0;
  cards.clear();
}

/** The influence of full colour: the strongest token of the sequence, or of all that are listed. */
function scaleOf({ sequence, view }) {
  return (view.scale === "shared" ? view.peak : sequence.peaks?.[view.kind]) || 1;
}

function cardHead(sequence, view) {
  const [feed, meaning] = FEED_NAMES[sequence.feed] ?? [sequence.feed, ""];
  const meter = el("i", { class: sequence.score < 0 ? "minus" : "plus" });
  meter.style.width = `${Math.min(1, Math.abs(sequence.score) / view.strongest) * 100}%`;
  const link = linkTo(RECORD.queries[sequence.query], sequence);
  return el(
    "header",
    {},
    el("a", { class: "rank", href: link, title: "Permanent link to this sequence" }, String(sequence.rank)),
    el(
      "span",
      { class: "score" },
      el("b", {}, number(sequence.score, true)),
      el("span", { class: "meter", "aria-hidden": "true" }, meter),
    ),
    el("span", { class: "badge", title: meaning }, visible(feed)),
    sequence.spurious
      ? el(
          "span",
          {
            class: "badge warn",
            title:
              "The 2-norm of its tokenwise influences is above 2/3 of their 1-norm (Section 5.3 of the paper): " +
              "often such a sequence is irrelevant to the query",
          },
          `maybe spurious \u00b7 sparsity ${number(sequence.sparsity)}`,
        )
      : null,
    el(
      "span",
      {
        class: "source",
        dir: "auto",
        title: "Document, token of it that the sequence begins with, number of the sequence",
      },
      visible(sequence.document ?? ""),
      el("small", {}, ` + ${number(sequence.offset)} \u00b7 sequence ${sequence.id}`),
    ),
  );
}

function cardFoot(card, entry) {
  const { sequence } = entry;
  const toggle = (key, label, title, make) =>
    el(
      "button",
      {
        type: "button",
        "data-does": key,
        "aria-expanded": "false",
        title,
        click: (event) => {
          const button = event.currentTarget;
          const open = entry.open[key];
          button.setAttribute("aria-expanded", String(!open));
          if (open) open.forEach((node) => node.remove());
          entry.open[key] = open ? null : make();
        },
      },
      label,
    );
  const spot = (unit) => {
    entry.text.querySelector(".spot")?.classList.remove("spot");
    if (unit !== null) entry.text.querySelector(`[data-unit="${unit}"]`)?.classList.add("spot");
  };
  const layers = () => {
    const map = layerMap(sequence, spot);
    card.querySelector("footer").before(map);
    return [map];
  };
  const around = () => {
    const [before, after] = [
      ["before", sequence.before],
      ["after", sequence.after],
    ].map(([side, text]) =>
      el(
        "p",
        { class: `around ${side}`, dir: "auto" },
        text ? visible(text) : el("i", {}, side === "before" ? "nothing before it" : "nothing after it"),
      ),
    );
    entry.text.before(before);
    entry.text.after(after);
    return [before, after];
  };
  const details = [];
  if (sequence.bm25 !== null) details.push(`BM25 score ${number(sequence.bm25)}`);
  if (sequence.sparsity !== undefined) details.push(`sparsity ${number(sequence.sparsity)}`);
  return el(
    "footer",
    {},
    sequence.rows && hasMap(sequence) ? toggle("layers", "Layers", "Layer × token map (l)", layers) : null,
    sequence.before !== undefined ? toggle("around", "Around it", "Neighbouring text (c)", around) : null,
    el("span", { class: "detail" }, details.join(" \u00b7 ")),
    sequence.peaks ? el("span", { class: "detail scale" }) : null,
  );
}

/** Write what full colour means at the foot of each card. */
function stateScales() {
  for (const [card, entry] of cards) {
    const place = card.querySelector(".scale");
    if (place)
      place.textContent = entry.values
        ? `full colour \u00b1${number(scaleOf(entry))}`
        : "not computed for this sequence";
  }
}
