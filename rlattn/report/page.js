"use strict";
// Draws the page from its JSON. Text from a run only ever becomes text nodes: nothing here parses HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const SVG = "http://www.w3.org/2000/svg";
const INVISIBLE = /[\p{Cf}\p{Cc}\p{Zl}\p{Zp}\p{Cs}\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\ufe00-\ufe0f\u2800\p{Default_Ignorable_Code_Point}]/u;

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "rect", "circle", "g"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

// Characters that hide or turn text around become visible codes.
function visible(text) {
  const nodes = [];
  let plain = "";
  for (const character of String(text)) {
    if (character === "\n" || character === "\t" || !INVISIBLE.test(character)) { plain += character; continue; }
    const code = "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(plain, el("span", { class: "ctl", title: "an invisible character" }, code));
    plain = "";
  }
  return [...nodes, plain].filter((node) => node !== "");
}

function plain(text) {
  return visible(text).map((node) => node.textContent ?? node).join("");
}

// A token's text; what has no ink is spelled.
function spelled(text) {
  return visible(text === "" ? "·" : /^\s+$/.test(text) ? text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") : text.replace(/^ /, "␣"));
}

function show(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
}

// Room for an axis is small: 300k, 4e-5.
function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size && size < 1e-3 ? value.toExponential(1).replace(".0e", "e") : show(value);
}

function section(id, title, ...children) {
  if (!children.flat(Infinity).some(Boolean)) return null;
  return el("section", { id, "aria-label": title }, el("h2", {}, title), children);
}

// ---- charts -----------------------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
  return found;
}

function chart(curve) {
  const [W, H, L, R, T, B] = [320, 170, 42, 8, 8, 20];
  const series = curve.series.filter((one) => one.points.length);
  const all = series.flatMap((one) => one.points), bands = series.flatMap((one) => one.band || []);
  const xs = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  let [x0, x1] = [xs[0], xs[xs.length - 1]], y0 = Infinity, y1 = -Infinity;
  for (const y of [...all.map((p) => p[1]), ...bands.flatMap((b) => [b[1], b[2]])]) { y0 = Math.min(y0, y); y1 = Math.max(y1, y); }
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === 0 && y1 === 0) y1 = 1;
  else if (y1 - y0 < 1e-3 * Math.abs(y1) || y1 - y0 < 1e-12) { const pad = Math.abs(y1) * 0.1 || 1; y0 -= pad; y1 += pad; }
  else { const pad = (y1 - y0) * 0.06; y0 = y0 >= 0 && y0 - pad < 0 ? 0 : y0 - pad; y1 += pad; }
  const X = (x) => L + ((x - x0) / (x1 - x0)) * (W - L - R), Y = (y) => H - B - ((y - y0) / (y1 - y0)) * (H - T - B);
  const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("");
  const cursor = el("g", {}), readout = el("div", { class: "readout", "aria-live": "polite" });
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "img",
    "aria-label": `${plain(curve.title)}, ${curve.x || "step"} ${xs[0]} to ${xs[xs.length - 1]}. Arrow keys read values.` });
  for (const y of ticks(y0, y1, 4))
    svg.append(el("line", { class: "grid", x1: L, x2: W - R, y1: Y(y), y2: Y(y) }), el("text", { class: "tick", x: L - 5, y: Y(y) + 3, "text-anchor": "end" }, tick(y)));
  for (const x of ticks(x0, x1, 5).filter((at) => curve.x || Number.isInteger(at)))
    svg.append(el("text", { class: "tick", x: X(x), y: H - 5, "text-anchor": "middle" }, tick(x)));
  series.forEach((one, i) => {
    const color = `var(--s${i % 6})`;
    if (one.band) {
      const area = el("path", { d: path(one.band.map((b) => [b[0], b[2]])) + path([...one.band].reverse().map((b) => [b[0], b[1]])).replace("M", "L") + "Z", opacity: 0.18 });
      area.style.fill = color;
      svg.append(area);
    }
    const line = el("path", { class: "curve", d: path(one.points) });
    line.style.stroke = color;
    if (i >= 6) line.style.strokeDasharray = i < 12 ? "5 3" : "1.5 3";
    svg.append(line);
    if (one.points.length <= 15) for (const p of one.points) {
      const dot = el("circle", { cx: X(p[0]), cy: Y(p[1]), r: 2.4 });
      dot.style.fill = color;
      svg.append(dot);
    }
  });
  svg.append(cursor);
  const values = series.map((one) => new Map(one.points.map((p) => [p[0], p[1]])));
  let at = xs.length - 1;
  const read = (index, moved) => {
    at = Math.max(0, Math.min(xs.length - 1, index));
    const x = xs[at], parts = [];
    cursor.replaceChildren();
    if (moved) cursor.append(el("line", { class: "cursor", x1: X(x), x2: X(x), y1: T, y2: H - B }));
    values.forEach((value, i) => {
      const exact = value.has(x), y = exact ? value.get(x) : nearest(series[i].points, x);
      if (y !== null) parts.push(series.length > 1 ? `${plain(short(series, i))} ${exact ? "=" : "≈"} ${show(y)}` : show(y));
    });
    readout.textContent = `${curve.x || "step"} ${x}${curve.after || ""}: ${parts.join(" · ")}${curve.unit && series.length === 1 ? " " + curve.unit : ""}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), want = x0 + (((event.clientX - box.left) / box.width) * W - L) / (W - L - R) * (x1 - x0);
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - want) < Math.abs(xs[best] - want)) best = i;
    read(best, true);
  });
  svg.addEventListener("pointerleave", () => read(xs.length - 1, false));
  svg.addEventListener("keydown", (event) => {
    const move = event.altKey ? undefined : { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9, PageUp: -10, PageDown: 10 }[event.key];
    if (move) { read(at + move, true); event.preventDefault(); }
  });
  read(at, false);
  return el("figure", {}, el("h3", {}, visible(curve.title)), svg, readout,
    series.length > 1 ? el("div", {}, series.map((one, i) => key(i, one.name, one.about))) : null,
    el("figcaption", {}, visible(curve.about || "")));
}

// Of a curve that was thinned: the value of its nearest point, unless its points lie further apart than that.
function nearest(points, x) {
  let best = points[0];
  for (const p of points) if (Math.abs(p[0] - x) < Math.abs(best[0] - x)) best = p;
  const apart = (points[points.length - 1][0] - points[0][0]) / Math.max(1, points.length - 1);
  return Math.abs(best[0] - x) <= apart ? best[1] : null;
}

function key(i, name, about) {
  const swatch = el("i", { class: i < 6 ? null : i < 12 ? "dashed" : "dotted" });
  swatch.style.backgroundColor = `var(--s${i % 6})`;
  return el("small", { class: about ? "key told" : "key" }, swatch, el("span", {}, visible(name)), about ? [": ", ...visible(about)] : null);
}

function short(series, i) {
  const names = series.map((one) => { if (one.label) return one.label; const parts = one.name.split("/"); return parts.length > 2 ? parts[1] : parts[parts.length - 1]; });
  return names.filter((name) => name === names[i]).length > 1 ? series[i].name : names[i];
}

// A single curve that never moves is a line of text.
function charts(name) {
  const found = (data.curves || []).filter((curve) => curve.section === name && curve.series.some((one) => one.points.length));
  const still = (curve) => name !== "Learning" && curve.series.length === 1 && curve.series[0].points.every((p) => p[1] === curve.series[0].points[0][1]);
  const constants = found.filter(still).map((curve) => `${curve.title} ${show(curve.series[0].points[0][1])}${curve.unit ? " " + curve.unit : ""}`);
  return found.length ? [el("div", { class: "charts" }, found.filter((curve) => !still(curve)).map(chart)),
    constants.length ? el("p", { class: "soft" }, "The same at every step: ", visible(constants.join(", ")), ".") : null] : null;
}

// ---- heads ------------------------------------------------------------------------------------------------------

function heads() {
  const found = data.heads;
  if (!found) return [];
  const known = (row) => row.filter((span) => span !== null);
  const mean = (row) => row.reduce((a, b) => a + b, 0) / row.length;
  const per = { title: "Look-back distance by layer", unit: "tokens", about: "Mean over the heads of each layer that credit reads.",
    series: found.layers.map((layer, l) => ({ name: `layer ${layer}`, points: found.steps.filter((s) => known(s.span[l]).length).map((s) => [s.step, +mean(known(s.span[l])).toFixed(3)]) }))
      .filter((one) => one.points.length) };
  const members = (step, kind) => step[kind].flatMap((row, l) => row.map((share, h) => [share, `L${found.layers[l]}H${h}`]))
    .filter(([share]) => share > 0.5).sort((a, b) => b[0] - a[0]);
  const list = (step, kind) => members(step, kind).map(([share, name]) => `${name} (${Math.round(100 * share)} %)`).join(", ") || "none";
  const emerged = (kind, from, to) => {
    const before = new Set(members(from, kind).map(([, name]) => name));
    return members(to, kind).map(([, name]) => name).filter((name) => !before.has(name)).join(", ") || "none";
  };
  const [first, last] = [found.steps[0], found.steps[found.steps.length - 1]];
  const top = Math.max(...known(last.span.flat()));
  const grid = (step) => el("table", { "aria-label": `Heads at step ${step.step}` },
    el("tr", {}, el("th", {}, "layer"), step.span[0].map((_, h) => el("th", {}, `head ${h}`))),
    step.span.map((row, l) => el("tr", {}, el("th", {}, String(found.layers[l])), row.map((span, h) => {
      const kind = step.local[l][h] > 0.5 ? "L" : step.global[l][h] > 0.5 ? "G" : "";
      const cell = el("td", { class: "head heat", title: `local in ${Math.round(100 * step.local[l][h])} %, global in ${Math.round(100 * step.global[l][h])} % of the rollouts` }, `${span === null ? "–" : span.toFixed(1)} ${kind}`);
      cell.style.setProperty("--x", `${span === null ? 0 : Math.min(70, (70 * span) / top)}%`);
      return cell;
    }))));
  return [el("p", { class: "soft" }, "How many tokens each head looks back, on average, without WAAD's window. L: local, G: global, in more than half of the rollouts. L1H2 is head 2 of layer 1; both count from 0."),
    el("div", { class: "charts" }, per.series.length ? chart(per) : null,
      [...new Set([first, last])].map((step) => el("figure", {}, el("h3", {}, `Heads at step ${step.step}`), el("div", { class: "scroll" }, grid(step)),
        el("figcaption", {}, el("div", {}, `local: ${list(step, "local")}`), el("div", {}, `global: ${list(step, "global")}`))))),
    first === last ? null : el("p", { id: "emerged" }, `Emerged since step ${first.step}: local ${emerged("local", first, last)}; global ${emerged("global", first, last)}. `,
      `No longer: local ${emerged("local", last, first)}; global ${emerged("global", last, first)}.`)];
}

// ---- where credit went ------------------------------------------------------------------------------------------

const ABOUT_CREDIT = "Credit multiplies a token's advantage by a weight read from attention (arXiv 2510.13554). WAAD, windowed average attention distance: how far back local heads look; it jumps where a new chunk begins (preplan tokens). FAI, future attention influence: how much later tokens look back at this one, in global heads; its highest are anchors. The last tokens have no later ones to look back, so no FAI.";
const TENTHS = 10, OFTEN = 5, MOST = 12, LEAST = 6;

// Weights of the sampled rollouts, by place in the response and by word. Nothing where all tokens weigh the same.
function credited() {
  const { rollouts, vocabulary } = data.tokens || { rollouts: [] };
  const steps = [...new Set(rollouts.map((r) => r.step))];
  const own = (r) => r.tokens.map((word, i) => [word, r.weight?.[i], i]).filter(([, weight, i]) => typeof weight === "number" && !(+r.marks[i] & 4));
  const differ = (chosen) => { const found = chosen.flatMap((r) => own(r).map(([, weight]) => weight)); return found.some((weight) => weight !== found[0]); };
  if (!differ(rollouts)) return null;
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const along = (step) => {
    const tenths = Array.from({ length: TENTHS }, () => []);
    for (const r of rollouts) if (r.step === step && !r.cut) for (const [, weight, i] of own(r)) tenths[Math.floor((TENTHS * i) / r.tokens.length)].push(weight);
    return { name: `step ${step}`, points: tenths.map((found, i) => [(100 * (i + 0.5)) / TENTHS, found]).filter(([, found]) => found.length).map(([x, found]) => [x, +mean(found).toFixed(4)]) };
  };
  // the last quarter of the steps in which weights differ: a schedule may have let them fade
  const weighed = steps.filter((step) => differ(rollouts.filter((r) => r.step === step)));
  const late = new Set(weighed.slice(-Math.ceil(weighed.length / 4))), words = new Map();
  const all = rollouts.filter((r) => late.has(r.step)).flatMap((r) => own(r).map(([, weight]) => weight));
  for (const r of rollouts) if (late.has(r.step)) for (const [word, weight] of own(r)) {
    const found = words.get(word) || { total: 0, times: 0 };
    words.set(word, { total: found.total + weight, times: found.times + 1 });
  }
  const ranked = [...words].filter(([, found]) => found.times >= OFTEN).map(([word, found]) => [word, found.total / found.times, found.times]).sort((a, b) => b[1] - a[1]);
  const [high, low] = [ranked.slice(0, MOST), ranked.slice(Math.max(MOST, ranked.length - LEAST))];
  const row = ([word, weight, count]) => el("tr", {}, el("td", {}, el("code", {}, spelled(vocabulary[word]))), el("td", {}, weight.toFixed(2)), el("td", {}, String(count)));
  const head = () => el("tr", {}, el("th", {}, "token"), el("th", {}, "mean weight"), el("th", {}, "times"));
  const first = Math.min(...late), last = Math.max(...late), when = first === last ? `step ${last}` : `steps ${first} to ${last}`;
  return el("div", { class: "charts" },
    chart({ title: "Weight along the response", x: "at", after: " %", about: "Mean over the sampled rollouts, by how much of the response lies before; 1 is GRPO's equal credit.", series: [...new Set([weighed[0], weighed[weighed.length - 1]])].map(along) }),
    high.length ? el("figure", {}, el("h3", {}, "Tokens that got most"), el("table", {}, head(), high.map(row)), el("figcaption", {}, `Of those met ${OFTEN} times or more in the rollouts sampled at ${when}; all tokens: ${mean(all).toFixed(2)}.`)) : null,
    low.length ? el("figure", {}, el("h3", {}, "Tokens that got least"), el("table", {}, head(), low.map(row))) : null);
}

// ---- tokens -----------------------------------------------------------------------------------------------------

const SIGNALS = {
  weight: ["Weight", "what credit multiplied the advantage by", 1],
  waad: ["WAAD", "how far back local heads look, in tokens, counted up to attention.window"],
  fai: ["FAI", "how much later tokens look back at it, in global heads"],
  entropy: ["Entropy", "how uncertain the policy was, in nats"],
  advantage: ["Advantage", "of the rollout, before its weight", 0],
  logprob: ["Log-prob", "of the token under the policy; strong: unlikely"],
};

function tokenView() {
  const { rollouts, vocabulary, judged } = data.tokens;
  const steps = [...new Set(rollouts.map((r) => r.step))];
  const words = judged === "accuracy" ? ["right", "wrong"] : ["better than its group", "not better"];
  const verdict = (r) => r.right === null ? "not judged" : words[r.right ? 0 : 1];
  const trained = (r, name) => (r[name] || []).filter((v, i) => v !== null && !(+r.marks[i] & 4));
  const usable = Object.keys(SIGNALS).filter((name) => rollouts.some((r) => trained(r, name).length));
  const varies = (name) => { const found = rollouts.flatMap((r) => trained(r, name)); return found.some((v) => v !== found[0]); };
  const state = { step: steps.length - 1, filter: "all", signal: usable.find(varies) || usable[0] || "weight", at: 0, token: -1 };
  const domains = {};
  const domain = (name) => {
    if (domains[name]) return domains[name];
    const middle = SIGNALS[name][2], found = [];
    for (const r of rollouts) for (const v of trained(r, name)) found.push(middle === undefined ? (name === "logprob" ? -v : v) : Math.abs(v - middle));
    const sorted = Float64Array.from(found).sort(), most = sorted[sorted.length - 1];
    const high = (name === "weight" ? most : sorted[Math.floor(0.99 * (sorted.length - 1))]) || most || 1;
    return (domains[name] = [middle === undefined ? Math.min(sorted[0] ?? 0, high) : 0, high || 1]);
  };
  const oneSided = (name) => SIGNALS[name][2] === undefined || !rollouts.some((r) => trained(r, name).some((v) => v < SIGNALS[name][2]));
  const strength = (name, v) => {
    const [low, high] = domain(name), middle = SIGNALS[name][2];
    const size = middle === undefined ? (name === "logprob" ? -v : v) : Math.abs(v - middle);
    return Math.max(0, Math.min(1, high > low ? (size - low) / (high - low) : 0));
  };
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, value: state.step, id: "step", "aria-label": "Training step",
    oninput: () => { state.step = +slider.value; state.at = 0; draw(); } });
  const stepWord = el("output", { for: "step" });
  const filter = el("select", { id: "filter", onchange: () => { state.filter = filter.value; state.at = 0; draw(); } },
    ["all", ...words].map((word, i) => el("option", { value: ["all", "right", "wrong"][i] }, word)));
  const picker = el("select", { id: "rollout", onchange: () => { state.at = +picker.value; draw(); } });
  const turn = (by) => () => { if (picker.options.length) { state.at = (state.at + by + picker.options.length) % picker.options.length; draw(); } };
  const buttons = usable.map((name) => el("button", { type: "button", id: `signal-${name}`, title: SIGNALS[name][1], onclick: () => { state.signal = name; draw(); } }, SIGNALS[name][0]));
  const marks = el("input", { type: "checkbox", id: "marks", onchange: () => text.classList.toggle("marked", marks.checked) });
  marks.checked = true;
  const head = el("p"), prompt = el("pre"), scale = el("span", { class: "scale" });
  const text = el("div", { class: "tokens marked", tabindex: 0, role: "group", "aria-label": "Completion, token by token. Arrow keys move." });
  const detail = el("div", { class: "detail", "aria-live": "polite" });
  let shown = null;

  const select = (i) => {
    text.querySelector(".at")?.classList.remove("at");
    if (!shown || i < 0 || i >= shown.tokens.length) return;
    state.token = i;
    text.children[i].classList.add("at");
    const mark = +shown.marks[i], fact = (name, value) => el("span", {}, `${name} `, el("b", {}, value));
    detail.replaceChildren(fact("token", `${i + 1} of ${shown.tokens.length}`), el("span", {}, "“", visible(vocabulary[shown.tokens[i]]), "”"),
      ...usable.filter((name) => shown[name]).map((name) => fact(SIGNALS[name][0], show(shown[name][i]) + (name === "logprob" && shown[name][i] !== null ? ` (p ${show(Math.exp(shown[name][i]))})` : ""))),
      ...(mark & 1 ? [fact("", "anchor")] : []), ...(mark & 2 ? [fact("", "preplan")] : []), ...(mark & 4 ? [fact("", "not the policy's, not trained")] : []));
  };
  text.addEventListener("pointerover", (event) => { const token = event.target.closest(".token"); if (token) select(+token.dataset.i); });
  text.addEventListener("click", (event) => { const token = event.target.closest(".token"); if (token) select(+token.dataset.i); });
  text.addEventListener("keydown", (event) => {
    const move = event.altKey ? undefined : { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (!move || !shown) return;
    select(Math.max(0, Math.min(shown.tokens.length - 1, state.token + move)));
    text.querySelector(".at")?.scrollIntoView({ block: "nearest" });
    event.preventDefault();
  });

  function draw() {
    const step = steps[state.step];
    slider.setAttribute("aria-valuetext", `step ${step}`);
    stepWord.textContent = `step ${step}`;
    const here = rollouts.filter((r) => r.step === step && (state.filter === "all" || r.right === (state.filter === "right")));
    picker.replaceChildren(...here.map((r, i) => el("option", { value: i }, `${i + 1} of ${here.length}: ${verdict(r)}, reward ${show(r.reward)}, rollout ${r.rollout}, group ${r.group}`)));
    state.at = Math.min(state.at, Math.max(0, here.length - 1));
    picker.value = String(state.at);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(usable[i] === state.signal)));
    shown = here[state.at] || null;
    detail.replaceChildren(el("span", { class: "soft" }, "Point at a token, or focus the text and use the arrow keys."));
    if (!shown) {
      head.replaceChildren(`No such rollout was sampled at step ${step}.`);
      prompt.replaceChildren(); text.replaceChildren(); scale.replaceChildren();
      return;
    }
    const parts = Object.entries(shown.rewards).map(([name, value]) => `${name} ${show(value)}${(shown.neutral || []).includes(name) ? value === null ? " (failed or silent)" : " (failed or silent: its group's mean)" : ""}`).join(", ");
    head.replaceChildren(el("b", { class: shown.right === null ? null : shown.right ? "right" : "wrong" }, verdict(shown)), `; reward ${show(shown.reward)} (`, ...visible(parts), `); advantage ${show(shown.mean_advantage)}; ${shown.cut ? "cut here after " : ""}${shown.tokens.length} tokens`,
      shown.silent ? el("span", { class: "soft" }, "; no signal: its advantage is 0, so its weights moved nothing") : "");
    prompt.replaceChildren(...visible(shown.prompt));
    const name = state.signal, middle = SIGNALS[name][2], column = shown[name] || [];
    text.replaceChildren(...shown.tokens.map((word, i) => {
      const mark = +shown.marks[i], v = mark & 4 ? null : column[i], tone = v === null || v === undefined ? "none" : middle !== undefined && v < middle ? "cool" : "heat";
      const token = el("span", { class: `token ${tone}${mark & 1 ? " anchor" : ""}${mark & 2 ? " preplan" : ""}${mark & 4 ? " tool" : ""}`, "data-i": i });
      const string = vocabulary[word];
      token.append(...visible(string === "\n" ? "↵\n" : string === "" ? "·" : string));
      if (tone !== "none") token.style.setProperty("--x", `${(75 * strength(name, v)).toFixed(0)}%`);
      return token;
    }));
    const [low, high] = domain(name);
    const from = middle === undefined ? low : oneSided(name) ? middle : middle - high, to = middle === undefined ? high : middle + high;
    const ends = name === "logprob" ? [show(-from), show(-to)] : [show(from), show(to)];
    scale.replaceChildren(`${SIGNALS[name][0]}: ${SIGNALS[name][1]}.`, el("span", {}, ends[0], " ", el("span", { class: `ramp ${oneSided(name) ? "up" : "two"}` }), " ", ends[1]));
  }
  draw();
  const marked = rollouts.some((r) => /[1-3]/.test(r.marks));
  const legend = (name, word) => el("span", { class: `token ${name}` }, word);
  return el("div", { class: "box" },
    el("div", { class: "controls" }, el("label", {}, slider, stepWord), el("label", {}, "show", filter),
      el("label", {}, el("button", { type: "button", onclick: turn(-1), "aria-label": "Previous rollout" }, "‹"), picker, el("button", { type: "button", onclick: turn(1), "aria-label": "Next rollout" }, "›"))),
    el("div", { class: "controls" }, el("div", { class: "buttons", role: "group", "aria-label": "Colour by" }, buttons),
      marked ? el("label", { class: "marked" }, marks, "mark", legend("anchor", "anchor"), legend("preplan", "preplan")) : null),
    el("p", { class: "soft" }, "Rollouts drawn at random from each of these steps, whatever they earned.", marked ? " Anchor: among the highest FAI of its response; preplan: WAAD changes most after it." : "", rollouts.some((r) => /[4-7]/.test(r.marks)) ? " Italic: written by a tool or the other side of the dialogue, not trained." : ""),
    el("div", {}, scale), head, el("details", {}, el("summary", {}, "Prompt"), prompt), text, detail);
}

// ---- the page ---------------------------------------------------------------------------------------------------

function table(columns, rows) {
  return el("div", { class: "scroll" }, el("table", {}, el("tr", {}, columns.map((c) => el("th", {}, visible(c)))), rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, visible(cell)))))));
}

function folded(title, ...children) {
  return el("details", {}, el("summary", {}, title), children);
}

const tiles = (data.tiles || []).map((tile) => el("div", { class: "tile" }, el("small", {}, tile.label), el("b", {}, visible(tile.value)), el("small", {}, visible(tile.note))));
const [creditCurves, otherCurves] = [charts("Credit"), charts("Everything else")];
const sections = [
  section("warnings", "Failures and warnings",
    (data.alarms || []).map((alarm) => alarm.over
      ? el("p", { class: "soft" }, `Told at step ${alarm.since}, no longer so at the end: `, visible(alarm.found))
      : el("p", { class: "alarm" }, el("b", {}, visible(alarm.found)), ` First told at step ${alarm.since}. `, visible(alarm.advice))),
    (data.alarms || []).length ? el("p", { class: "soft" }, "A level is a mean over ten logged steps, the first ten or the last.") : null,
    (data.failures || []).map((one) => el("details", {}, el("summary", {}, "Reward ", visible(one.reward), `: ${one.count} rollouts, first at step ${one.step}: `, el("b", { class: "wrong" }, visible(one.problem))),
      el("p", {}, "Each was paid the mean of that reward over the rest of its group. The first completion it failed on:"), el("pre", { class: "box" }, visible(one.completion)))),
    data.kind === "run" && !data.alarms.length ? el("p", {}, "No sign of collapse in what was logged.") : null,
    (data.missing || []).length ? el("ul", { class: "soft" }, data.missing.map((line) => el("li", {}, visible(line)))) : null),
  ...(data.tables || []).map((one, i) => section(`table${i}`, one.title, el("p", { class: "soft" }, visible(one.about)), table(one.columns, one.rows))),
  section("learning", "Learning", charts("Learning") || (data.kind === "run" ? el("p", {}, "Nothing logged yet.") : null)),
  section("credit", "Credit", creditCurves ? el("p", { class: "soft" }, ABOUT_CREDIT) : null, credited(), creditCurves),
  section("effort", "Effort", charts("Effort")),
  section("monitor", "Self-monitor", charts("Self-monitor")),
  section("task", "The task's own numbers", charts("Task")),
  section("heads", "Attention heads", heads()),
  section("tokens", "Tokens", data.tokens ? tokenView() : null),
  section("samples", "Held-out completions", (data.samples || []).map((sample, i) => el("details", i < 2 ? { open: "" } : {},
    el("summary", {}, `Step ${sample.step}: `, el("b", { class: sample.right === null ? null : sample.right ? "right" : "wrong" }, sample.right === null ? "not judged" : sample.right ? "right" : "wrong"), " ", el("span", { class: "soft" }, visible(sample.prompt.trim().replace(/\s+/g, " ").slice(0, 70)))),
    el("pre", {}, visible(sample.prompt)), el("pre", { class: "box" }, visible(sample.completion)), el("p", {}, "Gold:"), el("pre", {}, visible(sample.gold))))),
  section("rest", "Everything else that was logged", otherCurves ? folded("Curves", otherCurves) : null),
  section("meaning", "What the numbers mean", (data.metrics || []).length ? folded("Every metric: meaning, unit, healthy range", table(["name", "meaning", "unit", "healthy"], data.metrics)) : null),
  section("recipe", "Recipe and environment", data.recipe ? folded("Recipe", el("pre", {}, visible(data.recipe))) : null, data.environment ? folded("Environment", el("pre", {}, visible(data.environment))) : null),
].filter(Boolean);
page.replaceChildren(
  el("h1", {}, visible(data.name)),
  el("nav", { "aria-label": "Sections" }, sections.map((one) => el("a", { href: `#${one.id}` }, one.getAttribute("aria-label")))),
  (data.setup || []).length ? el("p", { class: "setup" }, data.setup.map(([label, value]) => el("span", {}, el("small", {}, label, " "), visible(value)))) : "",
  el("div", { class: "tiles" }, tiles), ...sections);
document.documentElement.dataset.ready = "yes";
