// What the page carries: a record that is read at once, and blobs that are unpacked when they are looked at.

const RECORD = JSON.parse(byId("record").textContent);
const KINDS = ["update", "output", "input"];
const LEVELS = 127; // of packing.py
const MAP_LEVELS = 31;

const unpacked = new Map(); // number of a query -> promise of its sequences
const mapsOf = new Map(); // number of a query -> maps by side and rank, still packed

async function inflated(base64) {
  const packed = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The sequences of a query: what the header says of each, and `codes`, its bytes by kind. */
function sequencesOf(query) {
  if (!unpacked.has(query)) unpacked.set(query, unpack(query));
  return unpacked.get(query);
}

async function unpack(query) {
  const bytes = await inflated(byId(`query-${query}`).textContent);
  const start = 4 + new DataView(bytes.buffer).getUint32(0, true);
  const { sequences } = JSON.parse(new TextDecoder().decode(bytes.subarray(4, start)));
  let position = start;
  for (const sequence of sequences) {
    sequence.query = query;
    sequence.codes = {};
    for (const kind of KINDS.filter((kind) => sequence.peaks && kind in sequence.peaks)) {
      const end = position + sequence.lengths.length;
      sequence.codes[kind] = new Int8Array(bytes.buffer, position, end - position);
      position = end;
    }
  }
  return sequences;
}

/** Values of codes: finer steps near zero, as packing.py chose them. */
function restored(codes, peak, levels) {
  return Float32Array.from(codes, (code) => Math.sign(code) * (code / levels) ** 2 * peak);
}

/** Influence of each token, of one kind; null if it was not computed. */
function valuesOf(sequence, kind) {
  return sequence.codes[kind] ? restored(sequence.codes[kind], sequence.peaks[kind], LEVELS) : null;
}

const keyOf = (sequence) => `${sequence.side}:${sequence.rank}`;

function packedMaps(query) {
  if (!mapsOf.has(query)) mapsOf.set(query, JSON.parse(byId(`maps-${query}`).textContent));
  return mapsOf.get(query);
}

/** Whether the page carries the layer × token map of a sequence. */
const hasMap = (sequence) => keyOf(sequence) in packedMaps(sequence.query);

/** The map of a sequence: a row of layers for each token. */
async function mapOf(sequence) {
  const bytes = await inflated(packedMaps(sequence.query)[keyOf(sequence)]);
  return restored(new Int8Array(bytes.buffer), sequence.map_peak, MAP_LEVELS);
}

/**
 * What is drawn as one: a token; or several that only together are a character, of which all but the last are empty.
 * Each has the tokens `from` to `to`, its text, and where that begins in the sequence's.
 */
function unitsOf(sequence) {
  if (sequence.units) return sequence.units;
  const units = [];
  let at = 0;
  let from = 0;
  (sequence.lengths ?? [sequence.text.length]).forEach((length, token, all) => {
    if (length === 0 && token < all.length - 1) return;
    units.push({ from, to: token, at, text: sequence.text.slice(at, at + length) });
    at += length;
    from = token + 1;
  });
  sequence.units = units;
  return units;
}

/** Influence of each unit: the sum over its tokens. */
function unitValues(sequence, kind) {
  const values = valuesOf(sequence, kind);
  return (
    values &&
    unitsOf(sequence).map(({ from, to }) => values.subarray(from, to + 1).reduce((sum, value) => sum + value, 0))
  );
}
