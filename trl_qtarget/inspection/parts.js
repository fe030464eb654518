"use strict";
// What the page is made of: elements, texts and charts. Every text comes from a dataset or a model, and reaches the
// document as text nodes and attribute values of `make`, never as markup; the page's policy forbids the other way.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);

// Probabilities come as float32 in base64, one row of alternatives after the other.
function unpack(text, alternatives) {
  const { buffer } = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const values = new Float32Array(buffer);
  let end = 0;
  return alternatives.map(({ length }) => Array.from(values.subarray(end, (end += length))));
}
for (const example of data.examples) {
  example.p = unpack(example.p, example.alternatives);
  if (example.prior) example.prior = unpack(example.prior, example.alternatives);
  for (const each of example.methods) each.q = unpack(each.q, example.alternatives);
}

// --- Elements, numbers and texts -------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function format(x) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size !== 0 && size < 0.0005 ? size.toExponential(1) : size.toFixed(size < 100 ? 3 : 1);
  return x < 0 ? `−${text}` : text;
}
const signed = (x) => (x > 0 ? `+${format(x)}` : format(x));

const PICTURES = { " ": "·", "\n": "↵", "\t": "→", "\u007f": "␡", "\u00a0": "⍽" };
const UNSEEN = /^[\p{C}\p{Z}]$/u;
const JOINER = /^[\u200c\u200d]$/;

function picture(character) {
  const code = character.codePointAt(0);
  if (character in PICTURES) return PICTURES[character];
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

// [[text, is it a picture], ...]; cached, for few distinct tokens make up a page.
const seen = new Map();
function pieces(text) {
  if (seen.has(text)) return seen.get(text);
  const found = text === "" ? [["∅", true]] : [];
  // A token that begins with a combining mark would change the last letter of the one before it.
  const characters = [...(/^\p{M}/u.test(text) ? `\u25cc${text}` : text)];
  characters.forEach((character, i) => {
    const joins = JOINER.test(character) && i > 0 && i < characters.length - 1;
    const unseen = UNSEEN.test(character) && !joins;
    const last = found[found.length - 1];
    const shown = unseen ? picture(character) : character;
    if (last && last[1] === unseen && shown !== "↵" && last[0] !== "↵") last[0] += shown;
    else found.push([shown, unseen]);
  });
  seen.set(text, found);
  return found;
}

// `flowing`: in running text a line break is also taken.
function glyphs(text, flowing = false) {
  const nodes = [];
  for (const [shown, unseen] of pieces(text)) {
    nodes.push(unseen ? make("i", {}, shown) : shown);
    if (flowing && shown === "↵" && unseen) nodes.push("\n");
  }
  return nodes;
}
const word = (id) => data.vocabulary[id] ?? "";
const token = (id) => make("bdi", { class: "glyphs", dir: "auto" }, ...glyphs(word(id)));
const tokenOr = (id, none) => (id === null ? none : token(id));
const spoken = (id) => pieces(word(id)).map(([shown]) => shown).join("");

function described({ knobs, prior, arxiv, trained, equals }) {
  const parts = Object.entries(knobs ?? {}).map(([name, value]) => `${name} = ${value}`);
  if (prior) parts.push(`prior: ${prior}`);
  if (arxiv) parts.push(`arXiv:${arxiv}`);
  if (trained) parts.unshift(`here ${trained.replaceAll("`", "")}`);
  if (equals) parts.push(`equal to ${equals} on every label here`);
  return parts.join(" · ");
}

// Names of methods break where their words do.
const breakable = (name) => name.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]);

const facts = (pairs) =>
  pairs.map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, make("bdi", {}, value))));

const mean = (values) => (values.length ? values.reduce((sum, x) => sum + x, 0) / values.length : null);
const largest = (values, least) => values.reduce((top, x) => Math.max(top, x ?? least), least);

// --- Charts ----------------------------------------------------------------------------------------------------

function bars(series, low, high, caption) {
  const at = (x) => (100 * (x - low)) / (high - low);
  const svg = draw("svg", { viewBox: `0 0 100 ${series.length * 8 + 2}`, height: series.length * 8 + 2,
    preserveAspectRatio: "none", role: "img", "aria-label": caption });
  series.forEach(([kind, x], i) => svg.append(draw("rect", { class: kind, "data-value": x, y: i * 8 + 1, height: 6,
    x: at(Math.min(0, x)), width: at(Math.max(0, x)) - at(Math.min(0, x)) })));
  svg.append(draw("line", { class: "zero", x1: at(0), x2: at(0), y1: 0, y2: series.length * 8 + 2 }));
  return svg;
}

const [WIDTH, HEIGHT, LEFT, BOTTOM] = [190, 118, 30, 26];

// The frame of a chart whose bins are equally wide on paper, whatever their edges.
function frame(edges, top, xTitle, percent, caption) {
  const bins = edges.length - 1;
  const x = (i) => LEFT + (i * (WIDTH - LEFT - 4)) / bins;
  const y = (v) => HEIGHT - BOTTOM - (v * (HEIGHT - BOTTOM - 6)) / top;
  const svg = draw("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": caption });
  const label = (v) => (percent ? `${Number((100 * v).toPrecision(2))}%` : `${Number(v.toPrecision(2))}`);
  for (const v of [0, top / 2, top]) {
    svg.append(draw("line", { class: "axis", x1: LEFT, x2: x(bins), y1: y(v), y2: y(v) }),
      draw("text", { x: LEFT - 4, y: y(v) + 3, "text-anchor": "end" }, label(v)));
  }
  for (const i of [0, Math.floor(bins / 2), bins]) {
    svg.append(draw("text", { x: x(i), y: HEIGHT - 15, "text-anchor": i === bins ? "end" : "middle" }, `${edges[i]}`));
  }
  svg.append(draw("text", { x: x(bins / 2), y: HEIGHT - 3, "text-anchor": "middle" }, xTitle));
  return { svg, x, y };
}

function trustChart({ edges, mean: means, count }, top, name) {
  const { svg, x, y } = frame(edges, top, "p(y)", false, `${name}: mean trust by the label's probability`);
  const points = means.map((v, i) => v !== null && [x(i + 0.5), y(v), i]).filter(Boolean);
  svg.append(draw("polyline", { class: "line", points: points.map(([a, b]) => `${a},${b}`).join(" ") }));
  for (const [a, b, i] of points) {
    const title = `p(y) ${edges[i]} to ${edges[i + 1]}: mean trust ${format(means[i])} over ${count[i]} labels`;
    svg.append(draw("circle", { class: "dot", cx: a, cy: b, r: 2.4 }, draw("title", {}, title)));
  }
  return svg;
}

const shares = ({ count }) => count.map((n) => n / Math.max(1, count.reduce((sum, x) => sum + x, 0)));

// With a scale of its own: one method that leaves all mass at the labels would flatten the others.
function massChart(histogram, name) {
  const { edges, count } = histogram;
  const top = largest(shares(histogram), 0.01);
  const { svg, x, y } = frame(edges, top, "1 − Q(y)", true, `${name}: histogram of the mass that leaves the label`);
  shares(histogram).forEach((share, i) => {
    const title = `${edges[i]} to ${edges[i + 1]}: ${count[i]} labels`;
    const box = { x: x(i) + 0.5, width: x(i + 1) - x(i) - 1, y: y(share), height: y(0) - y(share) };
    svg.append(draw("rect", { class: "column", ...box }, draw("title", {}, title)));
  });
  return svg;
}
