// The lists of suspicious labels and examples. They show the method that page.js, further down in the same script, has
// chosen.

const ROWS = 200;

const words = (node) => make("button", { type: "button" }, node);
const TOKEN_COLUMNS = [
  { key: "label", title: "label", words: true, cell: (row) => words(token(row.id)) },
  { key: "e", title: "example", cell: (row) => make("bdi", {}, data.examples[row.e].name) },
  { key: "suspicion", title: "suspicion" },
  { key: "trust", title: "trust γ" },
  { key: "nll", title: "NLL" },
  { key: "entropy", title: "entropy" },
  { key: "p", title: "p(y)" },
  { key: "preferred", title: "preferred", words: true, cell: (row) => tokenOr(row.preferredId, "–") },
];
const EXAMPLE_COLUMNS = [
  { key: "e", title: "example", words: true, cell: (row) => words(make("bdi", {}, data.examples[row.e].name)) },
  { key: "suspicion", title: "suspicion" },
  { key: "trust", title: "mean γ" },
  { key: "nll", title: "mean NLL" },
  { key: "text", title: "text", words: true, cell: (row) => make("bdi", { class: "excerpt" }, row.text) },
];

// What is missing stays last in both directions.
function compare(a, b, way) {
  if (a === null || b === null) return (a === null) - (b === null);
  return a === b ? 0 : a < b ? -way : way;
}

function rowsTable(table, kinds) {
  const state = { rows: [], key: "suspicion", descending: true, shown: ROWS };
  const more = make("button", { type: "button", class: "more" }, "");
  const heads = kinds.map(({ key, title, words: left }) =>
    make("th", { scope: "col", class: left ? "words" : null },
      make("button", { type: "button", "data-key": key }, title)));
  const body = make("tbody");
  table.classList.add("rows");
  table.append(make("thead", {}, make("tr", {}, ...heads)), body);
  table.parentElement.after(more);

  function show() {
    state.rows.sort((a, b) => Boolean(a.other) - Boolean(b.other)
      || compare(a[state.key], b[state.key], state.descending ? -1 : 1));
    heads.forEach((head, i) => {
      const sorted = kinds[i].key === state.key ? (state.descending ? "descending" : "ascending") : null;
      if (sorted) head.setAttribute("aria-sort", sorted);
      else head.removeAttribute("aria-sort");
    });
    body.replaceChildren(...state.rows.slice(0, state.shown).map((row) => {
      const line = make("tr", {}, ...kinds.map(({ key, words: left, cell }) =>
        make("td", { class: left ? "words" : null }, cell ? cell(row) : format(row[key]))));
      line.place = { e: row.e, j: row.j };
      return line;
    }));
    const left = state.rows.length - state.shown;
    more.hidden = left <= 0;
    more.textContent = `${Math.min(left, ROWS)} more of ${left}`;
  }
  table.addEventListener("click", (event) => {
    const key = event.target.closest("th button")?.dataset.key;
    const place = event.target.closest("tr")?.place;
    if (place) jump(place);
    if (!key) return;
    state.descending = key === state.key ? !state.descending : !["label", "e", "preferred", "text"].includes(key);
    state.key = key;
    show();
  });
  more.addEventListener("click", () => {
    state.shown += ROWS;
    show();
  });
  return { state, set: (rows) => { Object.assign(state, { rows, shown: ROWS }); show(); } };
}

// The labels of an example as one line, around its most suspicious one.
const AROUND = 12;
function excerpt(example, j) {
  const [from, to] = [Math.max(0, j - AROUND), j + AROUND + 1];
  const text = example.scored.slice(from, to).map((position) => spoken(example.tokens[position])).join("");
  return `${from ? "…" : ""}${text}${to < example.scored.length ? "…" : ""}`;
}

// Conversations that are labelled as a whole: what the assistant has not written comes last, or not at all.
const other = (example, j) => Boolean(example.assistant) && !example.assistant[j];
const mixed = data.examples.some((example) => example.assistant);

const tokenTable = rowsTable(byId("suspicious-tokens"), TOKEN_COLUMNS);
const exampleTable = rowsTable(byId("suspicious-examples"), EXAMPLE_COLUMNS);

function showSuspicious() {
  const [tokens, wholes] = [[], []];
  data.examples.forEach((example, e) => {
    const { suspicion, trust } = example.methods[method];
    example.scored.forEach((_, j) => {
      if (other(example, j) && byId("assistant-only").checked) return;
      const [id, preferredId] = [example.alternatives[j][0], preferredOf(example.methods[method], j)];
      tokens.push({ e, j, other: other(example, j), id, preferredId, label: word(id), preferred: preferredId === null ? null : word(preferredId),
        suspicion: suspicion[j], trust: trust[j], nll: example.nll[j], entropy: example.entropy[j],
        p: example.p[j][0] });
    });
    const some = example.assistant?.includes(true);
    const order = suspicion.map((x, j) => [x, j]).filter(([, j]) => !some || !other(example, j)).sort((a, b) => b[0] - a[0]).slice(0, 3);
    if (order.length) {
      const suspected = mean(order.map(([x]) => x));
      wholes.push({ e, j: order[0][1], suspicion: suspected, trust: mean(trust), nll: mean(example.nll),
        text: excerpt(example, order[0][1]) });
    }
  });
  byId("no-suspicion").hidden = data.examples.some((example) => example.methods[method].suspicion.some((x) => x > 0));
  tokenTable.set(tokens);
  exampleTable.set(wholes);
}

byId("assistant-choice").hidden = !mixed;
byId("assistant-only").addEventListener("change", showSuspicious);

function exportRows() {
  const name = names[method];
  const lines = tokenTable.state.rows.map(({ e, j, label, suspicion, trust, nll }) => {
    const { name: example, scored, methods } = data.examples[e];
    const assistant = data.examples[e].assistant?.[j] ?? null;
    const place = { example, position: scored[j], token: label, method: name, assistant };
    const preferred = word(methods[method].preferred[j]);
    return JSON.stringify({ ...place, suspicion, trust, nll, preferred }) + "\n";
  });
  const address = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  make("a", { href: address, download: `suspicious-labels-${name.replace(/[^\w.-]+/g, "_")}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
