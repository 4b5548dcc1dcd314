// The page: the state that the server tells, drawn at most once a frame, and not at all while nobody can see it.

import { Chart } from "./chart.js";
import { follow } from "./link.js";
import { bytes, clock, count, duration, element, figure, isNumber, momentOf, say } from "./words.js";
import { toLookAt, WorkersTable } from "./workers.js";

const byId = (id) => document.getElementById(id);
/** Metrics that get a chart of their own, besides the loss. */
const MOST_METRICS = 7;

let state = null;
let isDrawn = true;
let cursor = null;

/** What was drawn last, by place. */
const drawn = new Map();

/** Whether `parts` are others than the last time; what stays is not drawn again, so that marked text stays marked. */
function isNew(place, ...parts) {
  const words = JSON.stringify(parts);
  if (drawn.get(place) === words) return false;
  drawn.set(place, words);
  return true;
}

// ----------------------------------------------------------------------------------------------- key figures

const tiles = new Map();

function tile(key, title, value, note = "", { isBad = false, part = null } = {}) {
  let made = tiles.get(key);
  if (!made) {
    made = { title: element("dt"), value: element("dd"), gauge: element("dd", { class: "gauge", "aria-hidden": "true" }), note: element("dd", { class: "note" }) };
    made.root = element("div", {}, made.title, made.value, made.gauge, made.note);
    byId("figures").append(made.root);
    tiles.set(key, made);
  }
  say(made.title, title);
  say(made.value, value);
  say(made.note, note);
  made.note.title = note;
  made.gauge.hidden = part === null;
  if (part !== null) made.gauge.style.setProperty("--part", String(Math.max(0, Math.min(1, part))));
  made.root.classList.toggle("bad", isBad);
}

/** The metric that says most: accuracy if there is one, else the first that is no loss. */
function mainMetric(metrics) {
  const names = Object.keys(metrics);
  return ["accuracy", ...names].find((name) => name in metrics && name !== "loss") ?? names[0];
}

function drawFigures(view) {
  const { buffer = {}, rates = {}, staleness = {}, evaluation = {}, rejected } = view;
  const metrics = evaluation.metrics ?? {};
  const main = mainMetric(metrics);
  const of = view.rounds ? { part: (view.version ?? 0) / view.rounds } : {};
  tile("version", "Round", figure(view.version), view.rounds ? `of ${figure(view.rounds)}` : view.epoch ? `epoch ${view.epoch}` : "", of);
  tile("loss", "Training loss", figure(view.loss, 3));
  tile("metric", main ? capital(main) : "Held out", main ? figure(metrics[main]) : "–", isNumber(evaluation.version) ? `at round ${figure(evaluation.version)}` : "");
  tile("rounds", "Rounds a minute", figure(rates.rounds_per_minute, 3), isNumber(rates.updates_per_second) ? `${figure(rates.updates_per_second, 3)} updates / s` : "");
  tile("staleness", "Staleness", figure(staleness.median, 3), isNumber(staleness.p95) ? `p95 ${figure(staleness.p95)}, max ${figure(staleness.max)}` : "");
  tile("buffer", "Buffer", buffer.goal ? `${figure(buffer.fill)} of ${figure(buffer.goal)}` : "–", "", buffer.goal ? { part: buffer.fill / buffer.goal } : {});
  const waiting = queueOf(view, "updates");
  tile("waiting", "Updates waiting", waiting ? figure(waiting.ready) : "–", waiting && isNumber(waiting.unacked) ? `${figure(waiting.unacked)} in hand` : "");
  const reasons = Object.entries(rejected ?? {}).filter(([reason]) => reason !== "run-done").sort((one, other) => other[1] - one[1]);
  const all = reasons.reduce((sum, [, times]) => sum + times, 0);
  const dead = view.dead_letters;
  const most = reasons.length ? `${reasons[0][1]} ${reasons[0][0]}${reasons.length > 1 ? ", …" : ""}` : "";
  if (isNumber(dead)) tile("dead", "Dead letters", figure(dead), most, { isBad: all > 0 });
  else tile("dead", "Rejected", figure(all), most, { isBad: all > 0 });
}

/** Workers that are named on top; all of them stand first in the table. */
const MOST_NAMED = 4;

function drawAttention(workers) {
  const found = toLookAt(workers);
  const shown = found.slice(0, MOST_NAMED);
  if (!isNew("attention", shown, found.length)) return;
  const list = byId("attention");
  list.hidden = !found.length;
  list.replaceChildren(...shown.map(({ name, text, tone }) => element("li", {}, element("b", {}, name), element("span", { class: `remark ${tone}` }, text))));
  if (found.length > shown.length) list.append(element("li", {}, element("a", { href: "#workers" }, `${figure(found.length - shown.length)} more`)));
}

const queueOf = (view, purpose) => Object.values(view.queues ?? {}).find((queue) => queue.purpose === purpose);

// ---------------------------------------------------------------------------------------------------- curves

const charts = new Map();

function moved(value, words) {
  cursor = value;
  say(byId("cursor-words"), words);
  for (const { chart } of charts.values()) chart.point(value);
}

/** Which charts there are, in order, and what each shows: made from the names of the curves that came. */
function plan(series) {
  const names = Object.keys(series);
  const metrics = [...new Set(names.filter((name) => /^(held|own):/.test(name)).map((name) => name.replace(/^\w+:/, "")))]
    .filter((name) => name !== "loss")
    .sort((one, other) => (other === "accuracy") - (one === "accuracy") || (one < other ? -1 : 1));
  const of = (name) => [
    { name: "held out", key: `held:${name}` },
    { name: "workers’ own", key: `own:${name}`, quiet: true },
  ];
  const first = metrics.length ? metrics[0] : "accuracy";
  return [
    { key: "loss", title: "Loss", isLoss: true, smooth: true, curves: [{ name: "training", key: "loss" }, ...of("loss")] },
    { key: `metric ${first}`, title: capital(first), curves: of(first) },
    ...metrics.slice(1, MOST_METRICS).map((name) => ({ key: `metric ${name}`, title: capital(name), curves: of(name) })),
    { key: "seconds", title: "Seconds a round", zero: true, smooth: true, curves: [{ name: "", key: "seconds" }] },
    { key: "staleness", title: "Staleness", zero: true, smooth: true, curves: [{ name: "", key: "staleness" }] },
    ...("waiting" in series || "dead" in series
      ? [{ key: "waiting", title: "Queues", zero: true, smooth: true, curves: [{ name: "updates", key: "waiting" }, { name: "dead letters", key: "dead", quiet: true }] }]
      : []),
  ];
}

/** How many charts stand in rows of two, the first ones; the others stand in rows of three, and none is left over. */
const wideOnes = (number) => [2, 4, 6].find((wide) => wide <= number && (number - wide) % 3 === 0) ?? number;

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function drawCharts(series) {
  const axis = document.querySelector("input[name=axis]:checked").value;
  const planned = plan(series);
  const wide = wideOnes(planned.length);
  for (const [key, { chart }] of charts) {
    if (!planned.some((wanted) => wanted.key === key)) {
      chart.root.remove();
      charts.delete(key);
    }
  }
  planned.forEach((wanted, index) => {
    let known = charts.get(wanted.key);
    if (!known) {
      known = { chart: new Chart({ title: wanted.title, zero: wanted.zero, smooth: wanted.smooth, moved }) };
      known.chart.root.dataset.key = wanted.key;
      charts.set(wanted.key, known);
    }
    const { chart } = known;
    chart.root.classList.toggle("large", index < wide);
    const place = byId("charts");
    if (place.children[index] !== chart.root) place.insertBefore(chart.root, place.children[index] ?? null);
    const curves = wanted.curves.filter(({ key }) => series[key]?.length).map(({ name, key, quiet }) => ({ name, quiet, points: series[key] }));
    chart.show(curves, axis, Boolean(wanted.isLoss && byId("log-loss").checked));
    chart.point(cursor);
  });
}

// ------------------------------------------------------------------------------------------------ the others

const workers = new WorkersTable({ place: byId("workers-table"), words: byId("workers-words"), filter: byId("workers-filter"), more: byId("workers-more") });

function drawQueues(view) {
  if (!isNew("queues", view.queues)) return;
  const queues = Object.values(view.queues ?? {});
  if (!queues.length) {
    byId("queues").replaceChildren(element("p", { class: "nothing" }, "Nothing is known of the run’s queues."));
    return;
  }
  const row = (queue) =>
    element(
      "tr", {},
      element("th", { scope: "row", title: queue.name }, queue.purpose),
      element("td", { class: `number${queue.purpose === "dead letters" && queue.ready > 0 ? " bad" : ""}` }, figure(queue.ready)),
      element("td", { class: "number" }, figure(queue.unacked)),
      element("td", { class: "number" }, bytes(queue.bytes)),
    );
  const head = (title, kind) => element("th", { scope: "col", class: kind }, title);
  byId("queues").replaceChildren(
    element(
      "table", { class: "queues" },
      element("thead", {}, element("tr", {}, head("Queue"), head("Ready", "number"), head("Unacked", "number"), head("Size", "number"))),
      element("tbody", {}, ...queues.sort((one, other) => (one.name < other.name ? -1 : 1)).map(row)),
    ),
  );
}

function drawRest(view) {
  if (!isNew("rest", view.aggregators?.map(({ name, active, epoch }) => [name, active, epoch]), view.rejected, view.disk, view.missing)) return;
  const rows = [];
  const add = (title, ...texts) => {
    const shown = texts.filter(Boolean);
    if (shown.length) rows.push(element("div", {}, element("dt", {}, title), ...shown.map((text) => element("dd", {}, text))));
  };
  add("Aggregators", ...(view.aggregators ?? []).map(({ name, active, epoch }) => `${name}: ${active ? "active" : "stands by"}${isNumber(epoch) ? `, epoch ${epoch}` : ""}`));
  const reasons = Object.entries(view.rejected ?? {}).sort((one, other) => other[1] - one[1]);
  add("Rejected", ...reasons.map(([reason, times]) => `${figure(times)} ${reason}`));
  const { disk = {} } = view;
  add("Checkpoints", isNumber(disk.bytes) && `${isNumber(disk.checkpoints) ? `${count(disk.checkpoints, "checkpoint")}, ` : ""}${bytes(disk.bytes)}`, isNumber(disk.free) && `${bytes(disk.free)} free on that disk`);
  add("Not known", ...(view.missing ?? []));
  if (!rows.length) rows.push(element("p", { class: "nothing" }, "Nothing more."));
  byId("rest").replaceChildren(...rows);
}

let logged = -1;

function drawLog(log) {
  const list = byId("log");
  const now = Date.now() / 1000;
  const line = ({ time, level, kind, text }) =>
    element("li", { class: [level, kind].filter((word) => /^[a-z]+$/.test(word ?? "")).join(" ") }, element("time", { datetime: momentOf(time)?.toISOString() }, clock(time, now)), element("span", {}, text));
  const newest = log.length ? log[log.length - 1].number : -1;
  if (newest < logged) list.replaceChildren();
  const fresh = newest < logged ? log : log.filter(({ number }) => number > logged);
  logged = newest;
  // The newest stands first, where it is seen; who has scrolled down stays there.
  const from = list.scrollTop;
  const height = list.scrollHeight;
  list.prepend(...fresh.map(line).reverse());
  while (list.children.length > 300) list.lastElementChild.remove();
  if (from > 0) list.scrollTop = from + list.scrollHeight - height;
}

function draw() {
  isDrawn = true;
  if (!state) return;
  const { view, series, log } = state;
  say(byId("run"), view.run ?? "…");
  const word = byId("state");
  word.dataset.state = view.state ?? "waiting";
  say(word, view.state === "silent" && isNumber(view.heard_seconds) ? `silent for ${duration(view.heard_seconds)}` : (view.state ?? "waiting"));
  document.title = `${view.run ?? "fedmq"} · ${isNumber(view.version) ? `round ${figure(view.version)} · ` : ""}${view.state ?? "waiting"}`;
  const alarms = byId("alarms");
  const texts = view.alarms ?? [];
  if (isNew("alarms", texts)) {
    alarms.replaceChildren(...texts.map((text) => element("p", {}, text)));
    alarms.hidden = !texts.length;
  }
  drawFigures(view);
  drawAttention(view.workers ?? {});
  drawCharts(series);
  workers.show(view.workers ?? {});
  drawQueues(view);
  drawRest(view);
  drawLog(log);
}

function ask() {
  if (!isDrawn || document.hidden) return;
  isDrawn = false;
  requestAnimationFrame(draw);
}

document.addEventListener("visibilitychange", ask);
for (const choice of document.querySelectorAll("input[name=axis], #log-loss")) {
  choice.addEventListener("change", () => {
    moved(null, "");
    ask();
  });
}

byId("log-rounds").addEventListener("change", (event) => byId("log").classList.toggle("no-rounds", !event.target.checked));

const link = byId("link");
follow("/events", {
  told(told) {
    state = told;
    ask();
  },
  linked(isUp) {
    link.dataset.up = String(isUp);
    document.body.classList.toggle("old", !isUp && state !== null);
    say(link, isUp ? "live" : state ? `not connected; as of ${clock(state.view.time)}` : "not connected");
  },
});
