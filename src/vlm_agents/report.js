// Draws report.html from its JSON block. Everything a model wrote goes in as text nodes, so it is never markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const SVG = ["svg", "g", "path", "rect", "line", "circle", "text", "title"];
function el(tag, attributes = {}, ...children) {
  const node = SVG.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value != null) node.setAttribute(name, value);
  node.append(...children.flat().filter(child => child != null));
  return node;
}
const number = x => x == null ? "n/a" : (Math.abs(x) < 1e5 ? String(Number(x.toPrecision(5)))
  : x.toLocaleString("en", {notation: "compact", maximumSignificantDigits: 4})).replace("-", "\u2212");
const signed = x => (x > 0 ? "+" : "") + number(x);
const words = name => name.replaceAll("_", " ");
const badge = stop => el("span", {class: "badge " + stop}, words(stop));
const picture = (index, room) => {
  const [src, width, height] = data.images[index], scale = Math.max(1, Math.floor(room / Math.max(width, height)));
  return el("img", {src, width: width * scale, height: height * scale, alt: "what the policy saw", class: scale > 1 ? "pixels" : ""});
};

// ---- header, cards, table
document.title = $("title").textContent = data.title;
$("subtitle").textContent = data.subtitle;
$("metrics").append(...data.metrics.map(([name, value]) =>
  el("div", {class: "card"}, el("span", {class: "number"}, number(value)), el("span", {class: "label"}, words(name).replace("/", " / ")))));
function cell(text) {
  const match = /^([\d.]+) \[([\d.]+), ([\d.]+)\]$/.exec(text);
  if (!match) return [text];
  const [at, low, high] = match.slice(1).map(value => 4 + 192 * Math.min(1, Number(value)));
  return [text, el("svg", {viewBox: "0 0 200 12", "aria-hidden": "true"}, el("line", {class: "rule", x1: 4, x2: 196, y1: 6, y2: 6}),
    el("line", {class: "curve", x1: low, x2: high, y1: 6, y2: 6}), el("circle", {class: "dot", cx: at, cy: 6, r: 3.5}))];
}
$("results").hidden = !data.rows.length;
$("table").append(el("thead", {}, el("tr", {}, data.columns.map(name => el("th", {scope: "col"}, words(name))))), el("tbody", {},
  data.rows.map(row => el("tr", {}, row.map((text, i) => i ? el("td", {}, cell(text)) : el("th", {scope: "row"}, text))))));

// ---- curves
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(factor => factor * power >= rough) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, i) => (first + i) * step);
}
function range(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = Math.max((high - low) * .06, Math.abs(high) * .006) || 1;  // never so close that the labels are all alike
  return [low - room, high + room];
}
function chart([name, points]) {
  const W = 340, H = 184, L = 46, R = 8, T = 6, B = 22;
  const xs = points.map(p => p[0]), [y0, y1] = range(points.map(p => p[1]));
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1e-9);
  const X = x => L + (W - L - R) * (x - x0) / (x1 - x0), Y = y => H - B - (H - T - B) * (y - y0) / (y1 - y0);
  const last = points.at(-1), output = el("output", {}, number(last[1]));
  const cursor = el("line", {class: "rule", y1: T, y2: H - B, visibility: "hidden"}), dot = el("circle", {class: "dot", r: 4});
  const point = ([x, y]) => { dot.setAttribute("cx", X(x)); dot.setAttribute("cy", Y(y)); };
  point(last);
  const svg = el("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${name}: from ${number(points[0][1])} to ${number(last[1])}`},
    ticks(y0, y1, 5).map(y => el("g", {}, el("line", {class: "rule", x1: L, x2: W - R, y1: Y(y), y2: Y(y)}),
      el("text", {x: L - 7, y: Y(y) + 4, "text-anchor": "end"}, number(y)))),
    (x1 - x0 < 1e-6 ? [x0] : ticks(x0, x1, Math.min(5, x1 - x0))).map(x => el("text", {x: X(x), y: H - 5, "text-anchor": "middle"}, number(x))), cursor,
    el("path", {class: "curve", d: "M" + points.map(([x, y]) => `${X(x).toFixed(2)} ${Y(y).toFixed(2)}`).join("L")}), dot);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * W / box.width;
    const near = points.reduce((best, p) => Math.abs(X(p[0]) - x) < Math.abs(X(best[0]) - x) ? p : best);
    point(near); cursor.setAttribute("x1", X(near[0])); cursor.setAttribute("x2", X(near[0])); cursor.setAttribute("visibility", "visible");
    output.textContent = `step ${near[0]}: ${number(near[1])}`;
  });
  svg.addEventListener("pointerleave", () => { point(last); cursor.setAttribute("visibility", "hidden"); output.textContent = number(last[1]); });
  return el("figure", {class: "card chart"}, el("figcaption", {}, name, output), svg);
}
const drawn = data.curves.filter(([, points]) => points.length);
$("training").hidden = !drawn.length;
$("curves").append(...drawn.map(chart));

// ---- episode player: `at` counts the turns; one past the last shows how it ended
let episode, at = 0, timer = null;
function fact(name, value, wrong) { return value == null ? null : el("div", {}, el("dt", {class: "label"}, name), el("dd", {class: wrong ? "wrong" : null}, value)); }
function told(turn) {
  const thought = turn.reply.filter(([kind]) => kind === "thought").map(([, text]) => text).join("").trim();
  return [
    el("div", {}, el("h3", {}, "Thought"), el("p", {class: thought ? "thought" : "muted"}, thought || "none in this reply")),
    el("div", {}, el("h3", {}, "Action"), el("span", {class: "action" + (turn.action == null ? " wrong" : "")}, turn.action ?? "no legal action"),
      turn.error && el("p", {class: "wrong"}, turn.error)),
    el("dl", {}, fact("reward", signed(turn.reward)), fact("value", turn.value == null ? null : number(turn.value)), fact("expert", turn.expert),
      turn.metrics.map(([name, value]) => fact(words(name), number(value))), turn.finish === "length" ? fact("reply", "cut at its length limit", true) : null),
    el("div", {}, el("h3", {}, "Reply as written"), el("pre", {tabindex: 0}, turn.reply.map(([kind, text]) =>
      kind ? el("mark", {class: kind === "action" ? "act" : ""}, text) : text))),
  ];
}
function ended() {
  return [el("div", {}, el("h3", {}, "Outcome"), el("p", {}, badge(episode.stop))), episode.error && el("p", {class: "wrong"}, episode.error),
    el("dl", {}, fact("return", signed(episode.return)), fact("turns", String(episode.turns.length)))];
}
function timeline() {
  const turns = episode.turns, W = 100 / (turns.length + 1), H = 72;
  const all = turns.flatMap(turn => [turn.reward ?? 0, turn.value ?? 0]), low = Math.min(0, ...all), high = Math.max(0, ...all, low + 1e-9);
  const Y = y => 4 + (H - 8) * (high - y) / (high - low);
  const valued = turns.map((turn, i) => [i, turn.value]).filter(([, value]) => value != null);
  return [el("svg", {viewBox: `0 0 100 ${H}`, preserveAspectRatio: "none", "aria-hidden": "true"},
    el("rect", {class: "here", x: at * W, width: W, y: 0, height: H, rx: .5}), el("line", {class: "rule", x1: 0, x2: 100, y1: Y(0), y2: Y(0)}),
    turns.map((turn, i) => turn.reward ? el("rect", {class: turn.reward > 0 ? "up" : "down", x: (i + .2) * W, width: W * .6,
      y: Math.min(Y(turn.reward), Y(0)), height: Math.max(1.5, Math.abs(Y(turn.reward) - Y(0)))}) : null),
    valued.length > 1 ? el("path", {class: "curve", d: "M" + valued.map(([i, value]) => `${(i + .5) * W} ${Y(value)}`).join("L")}) : null,
    turns.map((turn, i) => el("rect", {class: "hit", x: i * W, width: W, y: 0, height: H, onclick: () => go(i)},
      el("title", {}, `turn ${i + 1}: reward ${signed(turn.reward)}` + (turn.value == null ? "" : `, value ${number(turn.value)}`))))),
    el("div", {class: "legend"}, el("span", {}, el("i"), "reward"), valued.length > 1 ? el("span", {}, el("i", {class: "line"}), "value") : null,
      el("span", {}, `scale ${number(low)} to ${number(high)}`))];
}
function show() {
  const turn = episode.turns[at], [images, text] = episode.seen[at] ?? [[], "no turn was played"], room = $("frame").clientWidth - 32;
  $("frame").replaceChildren(...(images.length ? images.map(index => picture(index, room / images.length)) : [el("pre", {}, text)]));
  $("caption").textContent = images.length ? text : "";
  $("said").replaceChildren(...(turn ? told(turn) : ended()).filter(node => node));
  $("slider").value = at;
  $("place").textContent = turn ? `turn ${at + 1} of ${episode.turns.length}` : "the end";
  $("timeline").replaceChildren(...timeline());
  $("given").hidden = !turn?.prompt.length;
  $("prompt").replaceChildren(...(turn?.prompt ?? []).map(index => data.messages[index]).map(([role, text, images]) =>
    el("div", {class: "message"}, el("span", {class: "label"}, role), images.map(index => picture(index, 180)), el("pre", {}, text))));
}
function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => at < episode.turns.length ? go(at + 1, true) : play(false), 600) : null;
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  $("icon").setAttribute("d", on ? "M4 3h3v10H4zM9 3h3v10H9z" : "M4 2.5v11l9-5.5z");
}
function go(turn, playing = false) {
  if (!playing) play(false);
  at = Math.max(0, Math.min(episode.turns.length, turn));
  show();
}
const toggle = () => { const on = !timer; if (on && at === episode.turns.length) go(0); play(on); };
function choose(index) {
  episode = data.episodes[index];
  for (const button of document.querySelectorAll("#list button")) button.setAttribute("aria-current", button.value === String(index));
  $("headline").replaceChildren(el("h3", {}, episode.env), badge(episode.stop), el("span", {class: "muted"}, `seed ${episode.seed}, played by ${episode.policy}`));
  $("slider").max = episode.turns.length;
  go(0);
}
function filter(stop) {
  const kept = data.episodes.map((one, index) => [one, index]).filter(([one]) => !stop || one.stop === stop);
  for (const button of document.querySelectorAll("#filters button")) button.setAttribute("aria-pressed", button.value === (stop ?? ""));
  $("list").replaceChildren(...kept.map(([one, index]) => el("li", {}, el("button", {value: index, onclick: () => choose(index)},
    one.seen[0]?.[0].length ? el("img", {src: data.images[one.seen[0][0][0]][0], alt: ""}) : null,
    el("span", {}, badge(one.stop), el("br"), `seed ${one.seed}`, el("br"),
      el("span", {class: "muted"}, `return ${number(one.return)}, ${one.turns.length} turns`))))));
  choose(kept[0][1]);
}
if (data.episodes.length) {
  $("episodes").hidden = false;
  const stops = [...new Set(data.episodes.map(one => one.stop))];
  $("filters").append(...[null, ...stops].map(stop => el("button", {value: stop ?? "", onclick: () => filter(stop)},
    `${stop ? words(stop) : "all"} ${data.episodes.filter(one => !stop || one.stop === stop).length}`)));
  $("back").onclick = () => go(at - 1); $("next").onclick = () => go(at + 1); $("play").onclick = toggle;
  $("slider").oninput = () => go(Number($("slider").value));
  addEventListener("resize", show);
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, [tabindex]")) return;
    const act = {ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1), p: toggle}[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  filter(null);
}
