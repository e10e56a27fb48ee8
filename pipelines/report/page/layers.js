// Layers: the layer × token map of a sequence, and how the influence of a query spreads over layers.

const CELL = 11; // height of a row of the map
const NARROW = 3; // pixels of a column at least

/** Neighbouring rows of the same group: [{name, first, last}]. */
function rowGroups() {
  const found = [];
  RECORD.rows.groups.forEach((name, row) => {
    if (found.at(-1)?.name === name) found.at(-1).last = row;
    else found.push({ name, first: row, last: row });
  });
  return found;
}

const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The map of a sequence, drawn once its cells are unpacked; `point` is told the unit under the pointer. */
function layerMap(sequence, point) {
  const size = { tokens: sequence.lengths.length, rows: RECORD.rows.labels.length };
  const canvas = el("canvas", {
    role: "img",
    "aria-label": `Influence by layer (${size.rows} rows) and token (${size.tokens} columns)`,
  });
  canvas.style.height = `${CELL * size.rows}px`; // the room that it will take
  const reading = el("p", { class: "reading" }, "Point at a cell.");
  const scroller = el("div", { class: "map-scroll" }, canvas);
  const note = el("p", { class: "note" });
  mapOf(sequence).then((cells) => {
    const full = fullColour(cells);
    note.append(
      "Rows are layers, the first at the bottom; columns are tokens. ",
      el("span", { class: "of-sums" }, "Right: the sum of each row. "),
      `Full colour from \u00b1${number(full)} on; the strongest cell is \u00b1${number(sequence.map_peak)}.`,
    );
    canvas.redraw = () => drawMap(canvas, cells, size, full, scroller.clientWidth);
    canvas.redraw();
    const read = (event) => {
      const [token, row] = cellAt(event, canvas.getBoundingClientRect(), size);
      const index = unitsOf(sequence).findIndex(({ from, to }) => from <= token && token <= to);
      reading.replaceChildren(
        `${visible(RECORD.rows.labels[row])}, at `,
        el("q", {}, visible(unitsOf(sequence)[index].text.replace("\n", "\u21b5"))),
        ": ",
        el("b", {}, number(cells[token * size.rows + row], true)),
      );
      point(index);
    };
    for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, read); // a tap only goes down
    canvas.addEventListener("pointerleave", ({ pointerType }) => pointerType === "mouse" && point(null));
  });
  return el(
    "figure",
    { class: "map" },
    el("div", { class: "map-grid" }, rowLabels(), scroller, rowSums(sequence)),
    el("figcaption", {}, reading, note),
  );
}

/** Influence of full colour: that of one cell in two hundred, since a single strong cell would leave the rest pale. */
function fullColour(cells) {
  const sizes = Float32Array.from(cells, Math.abs).sort();
  return sizes[Math.floor(0.995 * (sizes.length - 1))] || sizes.at(-1) || 1;
}

/** Token and row under the pointer. */
function cellAt({ clientX, clientY }, { left, top, width, height }, { tokens, rows }) {
  const within = (position, count) => Math.min(count - 1, Math.max(0, Math.floor(position * count)));
  return [within((clientX - left) / width, tokens), rows - 1 - within((clientY - top) / height, rows)];
}

/** Draw cells a column a token, the first layer at the bottom, as the paper does. */
function drawMap(canvas, cells, { tokens, rows }, full, width) {
  const column = Math.max(NARROW, width / tokens);
  const ratio = window.devicePixelRatio || 1;
  const [wide, high] = [Math.max(1, Math.floor(column * tokens)), CELL * rows];
  [canvas.width, canvas.height] = [Math.round(wide * ratio), Math.round(high * ratio)];
  canvas.style.width = `${wide}px`;
  canvas.style.height = `${high}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = cssColour("--sunken");
  context.fillRect(0, 0, wide, high);
  const colours = [cssColour("--pos-cell"), cssColour("--neg-cell")];
  for (let token = 0; token < tokens; token++) {
    for (let row = 0; row < rows; row++) {
      const value = cells[token * rows + row];
      if (value === 0) continue;
      context.globalAlpha = Math.min(1, Math.abs(value) / full);
      context.fillStyle = colours[value > 0 ? 0 : 1];
      context.fillRect(token * column, (rows - 1 - row) * CELL, Math.max(1, column), CELL);
    }
  }
  context.globalAlpha = 1;
  context.fillStyle = cssColour("--line");
  for (const { first } of rowGroups().slice(1)) context.fillRect(0, (rows - first) * CELL - 0.5, wide, 1);
}

function rowLabels() {
  const labels = rowGroups()
    .reverse()
    .map(({ name, first, last }) => {
      const label = el("span", { title: RECORD.rows.labels.slice(first, last + 1).join("\n") }, visible(name));
      label.style.height = `${CELL * (last - first + 1)}px`;
      return label;
    });
  return el("div", { class: "map-rows" }, labels);
}

function rowSums(sequence) {
  const peak = Math.max(...sequence.rows.map(Math.abs)) || 1;
  const bars = sequence.rows.map((value, row) => {
    const bar = el("i", {
      class: value < 0 ? "minus" : "plus",
      title: `${RECORD.rows.labels[row]}: ${number(value, true)}`,
    });
    bar.style.width = `${(Math.abs(value) / peak) * 100}%`;
    bar.style.height = `${CELL - 2}px`;
    return bar;
  });
  return el("div", { class: "map-sums" }, bars.reverse());
}

/**
 * How the influence of some sequences spreads over layers: each sequence counts the same, its rows as shares of the sum
 * of their magnitudes, positive and negative apart. Returns [{label, group, plus, minus}] in the order of layers.
 */
function layerShares(sequences) {
  const counted = sequences.filter((sequence) => sequence.rows?.some((value) => value !== 0));
  return RECORD.rows.labels.map((label, row) => {
    let plus = 0;
    let minus = 0;
    for (const { rows } of counted) {
      const share = rows[row] / rows.reduce((sum, value) => sum + Math.abs(value), 0) / counted.length;
      if (share > 0) plus += share;
      else minus -= share;
    }
    return { label, group: RECORD.rows.groups[row], plus, minus };
  });
}
