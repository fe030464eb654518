// What the page does; parts.js and suspicious.js stand before it in the same script.

const LEVELS = 10;
// With more examples than FOLDED, all but the first OPEN are folded.
const [FOLDED, OPEN] = [10, 3];

let method = 0;
let chosen = null; // {e, j}: the example, and the index into its scored tokens.
const spans = []; // [e][j]: the element of a scored token.

// A title tells apart two variants of one method.
const names = data.methods.map(({ title, name }) => title ?? name);

// The token that a method's target prefers to the label; null where it prefers none.
const preferredOf = ({ suspicion, preferred }, j) => (suspicion[j] === 0 ? null : preferred[j]);

// --- Head, method switch and shading ---------------------------------------------------------------------------

function drawHead() {
  document.title = data.title;
  byId("title").append(make("bdi", {}, data.title));
  const labels = data.examples.reduce((sum, example) => sum + example.scored.length, 0);
  const pairs = [["model", data.model], ["reference model", data.reference], ["dataset", data.dataset],
    ["examples", `${data.examples.length}`], ["labels", labels.toLocaleString("en")], ["date", data.date],
    ["versions", Object.entries(data.versions).map((pair) => pair.join(" ")).join(", ")]];
  byId("facts").append(...facts(pairs.filter(([, value]) => value)));
  names.forEach((name, m) => {
    const radio = make("input", { type: "radio", name: "method", value: m });
    radio.checked = m === method;
    byId("methods").append(make("label", {}, radio, name));
  });
}

// Some trusts exceed one (importance weights, weights of the dataset): their shading ends at their largest.
const tops = data.methods.map((_, m) =>
  largest(data.examples.map((example) => largest(example.methods[m].trust, 1)), 1));

function drawLegend() {
  const ramp = Array.from({ length: LEVELS + 1 }, (_, level) => make("span", { class: `g${level}` }));
  const top = format(tops[method]).replace(/\.?0+$/, "");
  byId("legend").replaceChildren("trust γ", make("span", {}, "0"), make("span", { class: "ramp" }, ...ramp), top);
  byId("legend").setAttribute("aria-label", `Shading: trust γ from 0 (orange, dark) to ${top} (blue, pale)`);
}

function shade() {
  data.examples.forEach((example, e) => {
    const { trust } = example.methods[method];
    spans[e].forEach((span, j) => {
      span.className = trust[j] === null ? "t" : `t g${Math.round((LEVELS * Math.max(0, trust[j])) / tops[method])}`;
      span.setAttribute("aria-label", `${spoken(example.alternatives[j][0])}, trust ${format(trust[j])}`);
    });
    byId(`facts-${e}`).textContent = `${example.tokens.length} tokens, ${example.scored.length} labels · ` +
      `mean trust ${format(mean(trust))} · mean NLL ${format(mean(example.nll))}`;
  });
}

function switchTo(m) {
  method = m;
  const chosenMethod = data.methods[m];
  byId("formula").replaceChildren(make("code", {}, chosenMethod.formula), `  ${described(chosenMethod)}`);
  byId("suspicious-method").textContent = names[m];
  [...byId("figures").children].forEach((figure, i) => figure.classList.toggle("current", i === m));
  drawLegend();
  shade();
  showSuspicious();
  if (chosen) showPanel();
}

// --- Examples --------------------------------------------------------------------------------------------------

function drawExample(example, e) {
  const text = make("div", { class: "text", dir: "auto", role: "group", "aria-labelledby": `name-${e}` });
  const labels = new Map(example.scored.map((position, j) => [position, j]));
  let plain = null;
  spans[e] = [];
  example.tokens.forEach((id, position) => {
    const j = labels.get(position);
    if (j === undefined) {
      if (!plain) text.append((plain = make("span", { class: "u" })));
      plain.append(...glyphs(word(id), true));
      return;
    }
    plain = null;
    const span = make("span", { role: "button", tabindex: j ? -1 : 0 }, ...glyphs(word(id), true));
    span.place = { e, j };
    spans[e].push(span);
    text.append(span);
  });
  const name = make("h3", { id: `name-${e}` }, "Example ", make("bdi", {}, example.name));
  const facts = make("span", { class: "hint", id: `facts-${e}` });
  // A long page is read example by example: its first ones are open, and whatever leads to a token opens its own.
  const fold = make("details", { class: "example" }, make("summary", {}, name, facts), text);
  fold.open = e < OPEN || data.examples.length <= FOLDED;
  return make("article", {}, fold);
}

const placeOf = (event) => (event.target.closest ? event.target.closest(".t")?.place : undefined);

// One tab stop per example; the arrows move it.
function stopAt({ e, j }) {
  spans[e].forEach((span, i) => (span.tabIndex = i === j ? 0 : -1));
}

// Its scroll margins keep a token clear of the bar above and of the sheet below.
const reveal = ({ e, j }) => spans[e][j].scrollIntoView({ block: "nearest" });

function focusOn({ e, j }) {
  unfold({ e, j });
  stopAt({ e, j });
  spans[e][j].focus({ preventScroll: true });
  if (chosen) choose({ e, j });
  reveal({ e, j });
}

// The next or previous token, within the example and then into its neighbour.
function beside({ e, j }, by) {
  if (spans[e][j + by]) return { e, j: j + by };
  for (let other = e + by; spans[other]; other += by) {
    if (spans[other].length) return { e: other, j: by > 0 ? 0 : spans[other].length - 1 };
  }
  return { e, j };
}

// The token above or below: the one of the next other line that begins nearest.
function across(place, by) {
  const start = spans[place.e][place.j].getClientRects()[0];
  let [best, line, distance] = [place, null, Infinity];
  for (let at = beside(place, by), last = place; at.j !== last.j || at.e !== last.e; last = at, at = beside(at, by)) {
    const box = spans[at.e][at.j].getClientRects()[0];
    if (!box || Math.abs(box.top - start.top) < start.height / 2) continue;
    line = line ?? box.top;
    if (Math.abs(box.top - line) > start.height / 2) break;
    if (Math.abs(box.left - start.left) < distance) [best, distance] = [at, Math.abs(box.left - start.left)];
  }
  return best;
}

const held = ({ altKey, ctrlKey, metaKey }) => altKey || ctrlKey || metaKey;

// What the right arrow adds to the index of a token.
const onwardOf = ({ e, j }) => (getComputedStyle(spans[e][j].parentElement).direction === "rtl" ? -1 : 1);

function onKey(event) {
  const place = placeOf(event);
  if (!place || held(event)) return;
  const row = spans[place.e];
  const onward = onwardOf(place);
  const moves = {
    ArrowRight: () => beside(place, onward), ArrowLeft: () => beside(place, -onward),
    ArrowDown: () => across(place, 1), ArrowUp: () => across(place, -1),
    Home: () => ({ e: place.e, j: 0 }), End: () => ({ e: place.e, j: row.length - 1 }),
  };
  if (moves[event.key]) focusOn(moves[event.key]());
  else if (event.key === "Enter" || event.key === " ") choose(place);
  else return;
  if (event.key === "Enter") byId("panel").focus({ preventScroll: true });
  event.preventDefault();
}

// In the panel the arrows do what its buttons do, except where they scroll the table sideways.
function onPanelKey(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || !chosen || held(event) || event.target.closest(".scroll")) return;
  step(by * onwardOf(chosen));
  event.preventDefault();
}

function choose(place) {
  if (chosen) spans[chosen.e][chosen.j].removeAttribute("aria-current");
  chosen = place;
  document.body.classList.toggle("open", Boolean(place));
  byId("panel-head").hidden = !place;
  if (!place) return byId("panel-body").replaceChildren(make("p", { class: "hint" }, "No token chosen."));
  spans[place.e][place.j].setAttribute("aria-current", "true");
  stopAt(place);
  showPanel();
}

// To the label beside the chosen one; the focus stays where it is.
function step(by) {
  choose(beside(chosen, by));
  unfold(chosen);
  reveal(chosen);
}

function close() {
  if (!chosen) return;
  const { e, j } = chosen;
  choose(null);
  spans[e][j].focus({ preventScroll: true });
}

const unfold = ({ e, j }) => (spans[e][j].closest("details").open = true);

function jump(place) {
  unfold(place);
  choose(place);
  focusOn(place);
  spans[place.e][place.j].scrollIntoView({ block: "center" });
}

// --- The panel of a token --------------------------------------------------------------------------------------

const columns = (cell) =>
  data.methods.map((_, m) => make("td", { class: m === method ? "current" : null }, ...cell(m)));
const heading = (title, ...more) => make("tr", { class: "part" },
  make("th", { colspan: data.methods.length + 1, scope: "colgroup" }, title, ...more));

function showPanel() {
  const { e, j } = chosen;
  const example = data.examples[e];
  const [ids, p, prior] = [example.alternatives[j], example.p[j], example.prior && example.prior[j]];
  const of = example.methods;
  byId("panel-title").replaceChildren(token(ids[0]), make("small", {}, "position ", `${example.scored[j]} in example `,
    make("bdi", {}, example.name), ` · id ${ids[0]}`));

  const numbers = [["NLL", format(example.nll[j])], ["entropy", format(example.entropy[j])], ["p(y)", format(p[0])]];
  if (prior) numbers.push(["prior(y)", format(prior[0])]);

  const heads = names.map((name, m) =>
    make("th", { scope: "col", class: m === method ? "current" : null }, ...breakable(name)));
  const table = make("table", { class: "detail" }, make("thead", {}, make("tr", {}, make("td"), ...heads)));
  const body = table.appendChild(make("tbody"));
  const statistics = [["trust γ", "trust"], ["scale s", "scale"], ["Q(y)", "label_mass"], ["KL(Q‖p)", "kl"],
    ["suspicion", "suspicion"]];
  for (const [title, key] of statistics) {
    const cells = columns((m) => [format(of[m][key][j])]);
    body.append(make("tr", { "data-row": key }, make("th", { scope: "row" }, title), ...cells));
  }
  const preferred = columns((m) => [tokenOr(preferredOf(of[m], j), "the label")]);
  body.append(make("tr", { "data-row": "preferred" }, make("th", { scope: "row" }, "target prefers"), ...preferred));

  const kinds = [["delta", "label δ"], ["p", "policy p"], ...(prior ? [["prior", "prior"]] : []), ["q", "target Q"]];
  const key = kinds.map(([kind, title]) => make("span", { class: kind }, title));
  body.append(heading("Target", make("div", { class: "key" }, ...key)));
  const masses = of.flatMap((each) => each.q[j]);
  const [low, high] = [Math.min(0, ...masses), Math.max(1, ...masses)];
  ids.forEach((id, k) => {
    const others = [`p ${format(p[k])}`, ...(prior ? [`prior ${format(prior[k])}`] : [])];
    const cells = columns((m) => {
      const q = of[m].q[j][k];
      const series = [...(k ? [] : [["delta", 1]]), ["p", p[k]], ...(prior ? [["prior", prior[k]]] : []), ["q", q]];
      return [bars(series, low, high, `${spoken(id)}: Q ${[format(q), ...others].join(", ")}`), format(q)];
    });
    const head = make("th", { scope: "row" }, token(id), ...others.map((text) => make("small", {}, text)));
    body.append(make("tr", { class: "alternative", "data-row": `q${k}` }, head, ...cells));
  });

  // A step of size ε on the logits, z ← z − ε s (p − Q), carried through the softmax to first order.
  const changeOf = (m, k) => p[k] * (of[m].scale[j] * (of[m].q[j][k] - p[k]) - of[m].drift[j]);
  const reach = largest(of.flatMap((_, m) => ids.map((_, k) => Math.abs(changeOf(m, k)))), 1e-12);
  body.append(heading("What one step does", make("small", {}, "change of p per unit of learning rate on the logits")));
  ids.forEach((id, k) => {
    const cells = columns((m) => {
      const change = changeOf(m, k);
      const way = change > 0 ? "up" : "down";
      const svg = bars([[way, change]], -reach, reach, `${spoken(id)}: ${signed(change)}`);
      const arrow = { up: "▲ ", down: "▼ " }[way];
      return [svg, change ? make("span", { class: `${way}-text` }, arrow, signed(change)) : "0"];
    });
    const head = make("th", { scope: "row" }, token(id));
    body.append(make("tr", { class: "alternative", "data-row": `step${k}` }, head, ...cells));
  });
  const list = numbers.map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, value)));
  const scroll = make("div", { class: "scroll" }, table);
  byId("panel-body").replaceChildren(make("dl", { class: "numbers" }, ...list), scroll);
}

// --- Summary figures -------------------------------------------------------------------------------------------

function drawSummary() {
  const topTrust = largest(data.summary.flatMap((each) => each.trust_by_p.mean), 1);
  data.summary.forEach((each, m) => {
    const { formula } = data.methods[m];
    const name = names[m];
    const means = [["mean trust γ", "trust"], ["mean Q(y)", "label_mass"], ["mean KL(Q‖p)", "kl"],
      ["mean NLL", "nll"]];
    const pair = make("div", { class: "pair" },
      make("div", {}, make("h4", {}, "Trust by probability"), trustChart(each.trust_by_p, topTrust, name)),
      make("div", {}, make("h4", {}, "Mass leaving the label"), massChart(each.mass_leaving, name)));
    byId("figures").append(make("figure", {},
      make("figcaption", {}, make("b", {}, name), make("code", {}, formula),
        make("div", {}, described(data.methods[m]))),
      make("dl", {}, ...facts(means.map(([term, key]) => [term, format(each.mean[key])]))), pair));
  });
}

// --- Everything together ---------------------------------------------------------------------------------------

drawHead();
drawSummary();
byId("texts").append(...data.examples.map(drawExample));
switchTo(0);

byId("methods").addEventListener("change", (event) => switchTo(Number(event.target.value)));
byId("texts").addEventListener("click", (event) => {
  const place = placeOf(event);
  if (!place) return;
  choose(place);
  focusOn(place);
});
byId("texts").addEventListener("keydown", onKey);
byId("panel").addEventListener("keydown", onPanelKey);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") close();
});
byId("close").addEventListener("click", close);
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("export").addEventListener("click", exportRows);
