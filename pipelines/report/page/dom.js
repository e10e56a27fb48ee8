// The only way that anything becomes part of the page: elements by name, text as text nodes. Nothing parses markup.

const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);

/** An element. Attributes that are functions listen to the event of their name; null and false ones are left out. */
function el(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** An element of a drawing. */
function svg(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// What cannot be seen, or would move what stands around it: control characters, directional overrides and isolates,
// half surrogates. Marks such as U+200F stay: text in Hebrew or Arabic needs them, and they end with their paragraph.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\ud800-\udfff]/gu;

/** Text as it may be shown: what cannot be seen becomes a visible sign of the same meaning. */
function visible(text) {
  return text.replace(UNSEEN, (char) => {
    const code = char.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    if (code >= 0xd800 && code <= 0xdfff) return "\ufffd";
    return `\u2039U+${code.toString(16).toUpperCase().padStart(4, "0")}\u203a`;
  });
}

/** Text on one line. */
const oneLine = (text) => visible(text.replace(/\s+/gu, " ")).trim();

/** A number in a few digits, with a real minus sign; `signed` shows a plus too. */
function number(value, signed = false) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text =
    size === 0
      ? "0"
      : size >= 1e6 || size < 1e-3
        ? scientific(size)
        : size >= 1000
          ? Math.round(size).toLocaleString("en")
          : String(Number(size.toPrecision(size >= 100 ? 4 : 3)));
  return (value < 0 ? "\u2212" : signed && value > 0 ? "+" : "") + text;
}

function scientific(size) {
  const [digits, exponent] = size.toExponential(2).split("e");
  return `${Number(digits)}\u00d710${superscript(Number(exponent))}`;
}

const superscript = (whole) =>
  [...String(whole)]
    .map((char) => (char === "-" ? "\u207b" : "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"[char]))
    .join("");

const percent = (share) => (share === null || share === undefined ? "–" : `${number(100 * share)}\u00a0%`);

/** A probability: in percent, unless that is next to nothing. */
const chance = (p) => (p < 1e-4 ? number(p) : percent(p));

const plural = (count, word, words = `${word}s`) => `${count.toLocaleString("en")} ${count === 1 ? word : words}`;

/** A row of buttons of which one is pressed; that one has the key. `options` is [[value, label, explanation]]. */
function segmented(label, options, value, choose, name) {
  const buttons = options.map(([key, text, title]) =>
    el(
      "button",
      {
        type: "button",
        "aria-pressed": String(key === value),
        "data-value": key,
        "data-key": key === value && name,
        title,
        click: () => choose(key),
      },
      text,
    ),
  );
  return el("div", { class: "segmented", role: "group", "aria-label": label }, buttons);
}

/** A menu. */
function menu(label, options, value, choose, name) {
  const select = el(
    "select",
    { "aria-label": label, "data-key": name, change: () => choose(select.value) },
    options.map(([key, text]) => el("option", { value: key, selected: key === value }, text)),
  );
  return el("label", { class: "menu" }, el("span", {}, label), select);
}
