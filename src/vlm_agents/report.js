// Draws report.html from its JSON block. Everything a model wrote goes in as text nodes, so it is never markup.
"use strict";
const data = JSON.parse(document.getElementById("block").textContent);
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
  : x.toLocaleString("en", {notation: "compact", maximumSignificantDigits: 4})).replaceAll("-", "\u2212");
const signed = x => (x > 0 ? "+" : "") + number(x);
const words = name => name.replaceAll("_", " ").replace(/\bkl\b/g, "KL");
const badge = stop => el("span", {class: "badge " + stop}, words(stop));
const picture = (index, room) => {
  const [src, width, height] = data.images[index], scale = Math.max(1, Math.floor(room / Math.max(width, height)));
  return el("img", {src, width: width * scale, height: height * scale, alt: "what the policy saw", class: scale > 1 ? "pixels" : ""});
};

const small = x => x == null ? "n/a" : number(Number(x.toPrecision(3)));
const capital = text => text.slice(0, 1).toUpperCase() + text.slice(1);
const message = ([role, parts]) => el("div", {class: "message"}, el("span", {class: "label"}, role), parts.map(part => typeof part === "string" ? el("pre", {tabindex: 0}, part) : picture(part, 180)));

// ---- what came of it: the sentence, the results on one scale, the facts
document.title = $("title").textContent = data.title;
$("sentence").append(...data.sentence.replaceAll(" -> ", " \u2192 ").split(/([\d.]+ \[[\d., ]+\])/).flatMap((text, i) => {
  const [figure, ends] = text.split(/(?= \[)/);
  if (i % 2) return el("span", {}, figure, el("i", {}, ends));
  return text.split(/(\S*-\S*)/).map((word, k) => k % 2 ? el("span", {class: "word"}, word) : word);  // no name is broken at its hyphens
}));
const percent = share => `${100 * Math.max(0, Math.min(1, share))}%`;
function interval([share, low, high]) {
  return el("div", {class: "scale", role: "img", "aria-label": `${number(share)}, between ${small(low)} and ${small(high)}`},
    el("i", {class: "range", style: `left: ${percent(low)}; right: calc(100% - ${percent(high)})`}), el("i", {class: "at", style: `left: ${percent(share)}`}));
}
$("results").hidden = !data.results.length;
$("table").append(
  el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "policy"),
    el("th", {scope: "col", class: "on", "aria-label": "success, drawn"}, el("div", {class: "scale", "aria-hidden": "true"}, [0, .25, .5, .75, 1].map(x => el("b", {style: `left: ${percent(x)}`}, String(x))))),
    el("th", {scope: "col"}, "success [95 %]"), data.columns.map(name => el("th", {scope: "col", class: "value extra"}, name)))),
  el("tbody", {}, data.results.map(({policy, main, success, others}) => el("tr", {class: main ? "main" : null}, el("th", {scope: "row"}, policy), el("td", {class: "on"}, interval(success)),
    el("td", {}, el("b", {}, success[0].toFixed(3)), el("span", {class: "muted"}, ` [${success[1].toFixed(3)}, ${success[2].toFixed(3)}]`)),
    others.map(value => el("td", {class: "value extra"}, value == null ? "" : value.toFixed(Math.abs(value) < 10 ? 3 : 1).replace("-", "\u2212")))))));
$("results").after(...data.tags.map(({tag, columns, rows}) => el("div", {class: "card scroll tags", tabindex: 0, role: "region", "aria-label": `Success by ${tag}`}, el("table", {},
  el("thead", {}, el("tr", {}, el("th", {scope: "col"}, `success by ${tag}`), ["episodes", ...columns].map(name => el("th", {scope: "col", class: "value"}, name)))),
  el("tbody", {}, rows.map(([value, episodes, shares]) => el("tr", {}, el("th", {scope: "row"}, value), [String(episodes), ...shares.map(share => share == null ? "" : share.toFixed(3))].map(text => el("td", {class: "value"}, text)))))))));
const ENDED = {success: "succeeded", time_limit: "ran out of turns", too_long: "became too long for the model", failure: "were ended by the env without success", invalid: "had no legal reply", env_error: "broke off by an error of the env"};
$("ends").append(...data.results.filter(({ends}) => Object.entries(ends).some(([stop, count]) => count && stop !== "success")).map(({policy, ends}) =>
  el("div", {}, el("span", {}, policy), Object.keys(ENDED).filter(stop => ends[stop]).map(stop => el("span", {class: "badge " + stop}, `${ends[stop]} ${ENDED[stop]}`)))));
$("ends").hidden = !$("ends").children.length;
function copy(text, button, shown) {
  const told = said => { button.textContent = said; setTimeout(() => button.textContent = "Copy", 1500); };
  const select = () => { getSelection().selectAllChildren(shown); told("Selected"); };  // where a page may not copy
  navigator.clipboard ? navigator.clipboard.writeText(text).then(() => told("Copied"), select) : select();
}
$("facts").append(...data.facts.filter(([, value]) => value).map(([name, value]) => {
  if (name === "earlier report") value = el("a", {href: encodeURI(value)}, value);
  if (name !== "command") return el("div", {class: value.length > 18 ? "long" : null}, el("dt", {class: "label"}, name), el("dd", {}, value));
  const shown = el("pre", {tabindex: 0}, value), button = el("button", {onclick: () => copy(value, button, shown), "aria-label": "Copy the command"}, "Copy");
  return el("div", {class: "wide"}, el("dt", {class: "label"}, name), el("dd", {class: "command"}, shown, button));
}));

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
function chart(curve) {
  const {name, unit, meaning, axis, points, bounds, marks, first} = curve, W = first ? 520 : 340, H = first ? 230 : 184, L = 46, R = 12, T = 8, B = 36;
  const xs = [...points, ...marks].map(p => p[0]), [y0, y1] = range([...points.map(p => p[1]), ...bounds.flat(), ...marks.flatMap(mark => mark.slice(1))]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs), wide = x1 - x0 || 1;
  const shown = y => small(Math.abs(y) < 1e-6 * (y1 - y0) ? 0 : y);  // what rounding left is no figure
  const X = x => x1 === x0 ? (L + W - R) / 2 : L + (W - L - R) * (x - x0) / wide, Y = y => H - B - (H - T - B) * (y - y0) / (y1 - y0);
  const line = some => some.map(([x, y]) => `${X(x).toFixed(2)} ${Y(y).toFixed(2)}`).join("L");
  const last = points.at(-1), rest = `${shown(points[0][1])} \u2192 ${shown(last[1])}`, output = el("output", {}, points.length > 1 ? rest : shown(last[1]));
  const cursor = el("line", {class: "rule", y1: T, y2: H - B, visibility: "hidden"}), dot = el("circle", {class: "dot", r: 4});
  const point = ([x, y]) => { dot.setAttribute("cx", X(x)); dot.setAttribute("cy", Y(y)); };
  point(last);
  const svg = el("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${name} by ${axis}: from ${shown(points[0][1])} to ${shown(last[1])}`},
    ticks(y0, y1, 5).map(y => el("g", {}, el("line", {class: "rule", x1: L, x2: W - R, y1: Y(y), y2: Y(y)}),
      el("text", {x: L - 7, y: Y(y) + 4, "text-anchor": "end"}, number(y)))),
    (x1 === x0 ? [x0] : ticks(x0, x1, Math.min(6, wide))).map(x => el("text", {x: X(x), y: H - B + 16, "text-anchor": "middle"}, number(x))),
    el("text", {x: W - R, y: H - 3, "text-anchor": "end"}, axis), cursor,
    bounds.length ? el("path", {class: "band", d: "M" + line(points.map(([x], i) => [x, bounds[i][0]])) + "L" + line(points.map(([x], i) => [x, bounds[i][1]]).reverse()) + "Z"}) : null,
    el("path", {class: "curve", d: "M" + line(points)}), dot,
    marks.map(([x, y, low, high]) => el("g", {class: "mark"}, el("line", {x1: X(x), x2: X(x), y1: Y(low), y2: Y(high)}), el("circle", {cx: X(x), cy: Y(y), r: 4.5}),
      el("title", {}, `${curve.marked}, ${axis} ${x}: ${shown(y)} [${shown(low)}, ${shown(high)}]`))));
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * W / box.width;
    const near = points.reduce((best, p) => Math.abs(X(p[0]) - x) < Math.abs(X(best[0]) - x) ? p : best);
    point(near); cursor.setAttribute("x1", X(near[0])); cursor.setAttribute("x2", X(near[0])); cursor.setAttribute("visibility", "visible");
    output.textContent = `${axis} ${near[0]}: ${shown(near[1])}`;
  });
  svg.addEventListener("pointerleave", () => { point(last); cursor.setAttribute("visibility", "hidden"); output.textContent = rest; });
  const says = [meaning, unit && `(${unit})`].filter(Boolean).join(" ");
  return el("figure", {class: "card chart"}, el("figcaption", {}, first ? capital(words(name.split("/").at(-1))) : name, output), says && el("p", {}, says), svg,
    marks.length ? el("div", {class: "legend"}, el("span", {}, el("i", {class: "line"}), `${name}, with its 95 % interval`), el("span", {}, el("i", {class: "ring"}), curve.marked)) : null);
}
$("training").hidden = !data.curves.length;
$("curves").append(...data.curves.filter(curve => curve.first).map(chart));
const others = data.curves.filter(curve => !curve.first);
$("others").hidden = !others.length;
$("others").open = !$("curves").children.length;
$("others").firstChild.textContent = `${others.length} more ${others.length === 1 ? "curve" : "curves"}`;
$("others").addEventListener("toggle", () => $("more").children.length || $("more").append(...others.map(chart)));

// ---- all numbers, with what they mean
const counted = data.groups.reduce((sum, group) => sum + group.rows.flatMap(row => row[4]).filter(value => value != null).length, 0);
$("figures").hidden = !counted;
$("figures").querySelector("summary").textContent = `${counted} numbers, with their meaning`;
$("numbers").append(...data.groups.map(({name, title, says, columns, rows}) => {
  const single = columns.length === 1 && !columns[0];
  return el("div", {class: "card"}, el("h3", {}, title), says && el("p", {}, says), el("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": title}, el("table", {},
    el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "name"), columns.map(column => el("th", {scope: "col", class: "value"}, single ? "value" : column || "model")),
      ["unit", "healthy", "meaning"].map(text => el("th", {scope: "col"}, text)))),
    el("tbody", {}, rows.map(([base, unit, meaning, healthy, values]) => el("tr", {}, el("th", {scope: "row"}, el("code", {}, `${name}/${base}`)),
      values.map(value => el("td", {class: "value"}, value == null ? "" : number(value))), [unit, healthy, meaning].map(text => el("td", {}, text)))))))) ;
}));

// ---- rows of training data
$("data").hidden = !data.examples.length;
$("data").querySelector("p").textContent = "Rows of the data: what the model is asked, what it is to say, and what it says now.";
$("rows").append(...data.examples.map(({prompt, answer, reply}) => {
  const [, parts] = data.messages[prompt.at(-1)], given = prompt.map(index => data.messages[index]);
  return el("article", {class: "card example"}, el("div", {class: "seen"}, parts.map(part => typeof part === "string" ? el("p", {class: "asked", tabindex: 0}, part) : picture(part, 130))),
    el("div", {}, el("h3", {}, "To be learned"), el("pre", {tabindex: 0}, answer)),
    reply == null ? null : el("div", {}, el("h3", {}, "The model says ", reply === answer ? el("span", {class: "badge success"}, "the same") : el("span", {class: "badge time_limit"}, "something else")),
      reply === answer ? null : el("pre", {tabindex: 0}, reply)),
    given.length > 1 ? el("details", {}, el("summary", {}, `All ${given.length} messages`), given.map(message)) : null);
}));

// ---- episode player: `at` counts the turns; one past the last shows how it ended
let episode, at = 0, timer = null;
function fact(name, value, wrong) { return value == null ? null : el("div", {}, el("dt", {class: "label"}, name), el("dd", {class: wrong ? "wrong" : null}, value)); }
function told(turn) {
  const thought = turn.reply.filter(([kind]) => kind === "thought").map(([, text]) => text).join("").trim();
  return [
    el("div", {}, el("h3", {}, "Thought"), el("p", {class: thought ? "thought" : "muted"}, thought || "none in this reply")),
    el("div", {}, el("h3", {}, "Action"), el("span", {class: "action" + (turn.action == null ? " wrong" : "")}, turn.action ?? "no legal action"),
      turn.error && el("p", {class: "wrong"}, turn.error)),
    el("dl", {}, fact("reward", signed(turn.reward)), turn.bonuses.map(([name, value]) => fact(`of it ${words(name)}`, signed(value))), fact("value", turn.value == null ? null : number(turn.value)), fact("expert", turn.expert, turn.expert != null && turn.expert !== turn.action && at === episode.strayed),
      turn.metrics.map(([name, value]) => fact(words(name), number(value))), turn.finish === "length" ? fact("reply", "cut at its length limit", true) : null),
    el("div", {}, el("h3", {}, "Reply as written"), el("pre", {tabindex: 0}, turn.reply.map(([kind, text]) =>
      kind ? el("mark", {class: kind === "action" ? "act" : ""}, text) : text))),
  ];
}
function ended() {
  return [el("div", {}, el("h3", {}, "Outcome"), el("p", {}, badge(episode.stop))), episode.error && el("p", {class: "wrong"}, episode.error),
    el("dl", {}, fact("return", signed(episode.return)), fact("turns", String(episode.turns.length)))];
}
// The turns that decided the episode: where it left the expert's way, and where success was lost for good.
function moments() {
  const {strayed, lost, turns} = episode, fatal = turns[lost] && (lost === turns.length - 1 ? "ended it without success" : "put success out of reach");
  if (strayed != null && strayed === lost) return [[lost, "fatal", `left the expert\u2019s way and ${fatal}`]];
  return [[strayed, "flagged", "left the expert\u2019s way"], [lost, "fatal", fatal]].filter(([turn]) => turns[turn]);
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
    moments().map(([turn, kind]) => el("rect", {class: kind, x: turn * W, width: W, y: 0, height: 4})),
    turns.map((turn, i) => el("rect", {class: "hit", x: i * W, width: W, y: 0, height: H, onclick: () => go(i)},
      el("title", {}, `turn ${i + 1}: reward ${signed(turn.reward)}` + (turn.value == null ? "" : `, value ${number(turn.value)}`))))),
    el("div", {class: "legend"}, el("span", {}, el("i"), "reward"), valued.length > 1 ? el("span", {}, el("i", {class: "line"}), "value") : null,
      moments().map(([, kind, says]) => el("span", {}, el("i", {class: kind}), says)),
      high - low > 1e-9 ? el("span", {}, `scale ${number(low)} to ${number(high)}`) : null)];
}
function show() {
  const turn = episode.turns[at], [images, text] = episode.seen[at] ?? [[], "no turn was played"], room = $("frame").clientWidth - 32;
  $("frame").replaceChildren(...(images.length ? images.map(index => picture(index, room / images.length)) : [el("pre", {}, text)]));
  $("caption").textContent = images.length ? text : "";
  $("said").replaceChildren(...(turn ? told(turn) : ended()).filter(node => node));
  $("slider").value = at;
  $("slider").setAttribute("aria-valuetext", turn ? `turn ${at + 1}` : "the end");
  $("place").textContent = turn ? `turn ${at + 1} of ${episode.turns.length}` : "the end";
  $("timeline").replaceChildren(...timeline().filter(node => node));
  $("given").hidden = !turn?.prompt.length;
  $("prompt").replaceChildren(...(turn?.prompt ?? []).map(index => message(data.messages[index])));
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
const who = one => [one.policy, one.when].filter(Boolean).join(", ");
function choose(index) {
  episode = data.episodes[index];
  for (const button of document.querySelectorAll("#list button")) button.setAttribute("aria-current", button.value === String(index));
  $("headline").replaceChildren(el("h3", {}, episode.env), badge(episode.stop), el("span", {class: "muted"}, `seed ${episode.seed}, played by ${who(episode)}`));
  const twins = data.episodes.map((one, i) => [one, i]).filter(([one]) => one.seed === episode.seed && one.env === episode.env)
    .sort(([one], [other]) => other.policy.localeCompare(one.policy) || other.when.localeCompare(one.when));  // before, then after
  $("twins").hidden = twins.length < 2;
  $("twins").replaceChildren(el("span", {class: "label"}, "The same seed:"), ...twins.map(([one, i]) =>
    el("button", {class: one.stop, onclick: () => choose(i), "aria-current": i === index, title: words(one.stop)}, who(one))));
  $("moments").replaceChildren(...moments().map(([place, kind, says]) => {
    const {action, expert} = episode.turns[place], better = expert == null || expert === action ? "" : ` instead of ${expert}`;
    return el("button", {class: `stray ${kind}`, onclick: () => go(place)}, el("b", {}, `Turn ${place + 1} ${says}: `), `${action ?? "no legal action"}${better}`);
  }));
  $("slider").max = episode.turns.length;
  go(episode.stop === "success" ? 0 : moments()[0]?.[0] ?? 0);
}
const FILTERS = {when: one => one.when, policy: one => one.policy, outcome: one => words(one.stop)};
const ALL = {when: "before and after", policy: "all policies", outcome: "all outcomes"};
const chosen = {};
function filter(name, value) {
  chosen[name] = value;
  for (const button of document.querySelectorAll("#filters button")) button.setAttribute("aria-pressed", button.value === (chosen[button.name] ?? ""));
  const kept = data.episodes.map((one, index) => [one, index]).filter(([one]) => Object.entries(FILTERS).every(([key, of]) => !chosen[key] || of(one) === chosen[key]))
    .sort(([one], [other]) => (one.stop === "success") - (other.stop === "success"));
  $("list").replaceChildren(...kept.map(([one, index]) => el("li", {}, el("button", {value: index, onclick: () => choose(index)},
    one.seen[0]?.[0].length ? el("img", {src: data.images[one.seen[0][0][0]][0], alt: ""}) : null,
    el("span", {}, badge(one.stop), el("br"), one.policy + (one.when && !chosen.when ? `, ${one.when}` : ""), el("br"),
      el("span", {class: "muted"}, `return ${small(one.return)}, ${one.turns.length} turns`))))));
  if (kept.length) choose(kept[0][1]);
  else $("list").append(el("li", {}, el("p", {class: "muted"}, "none of these")));
}
if (data.episodes.length) {
  $("episodes").hidden = false;
  for (const [name, of] of Object.entries(FILTERS)) {
    const values = [...new Set(data.episodes.map(of))];
    if (values.length > 1) $("filters").append(el("div", {class: "filter", role: "group", "aria-label": `Show episodes by ${name}`}, ["", ...values].map(value =>
      el("button", {name, value, onclick: () => filter(name, value)}, value || ALL[name]))));
  }
  $("back").onclick = () => go(at - 1); $("next").onclick = () => go(at + 1); $("play").onclick = toggle;
  $("slider").oninput = () => go(Number($("slider").value));
  addEventListener("resize", show);
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, [tabindex]")) return;
    const act = {ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1), p: toggle}[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  filter("when", data.episodes.some(one => one.when === "after training") ? "after training" : "");
}
