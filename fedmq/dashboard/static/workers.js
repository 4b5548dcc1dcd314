// The table of the workers: those that need somebody's attention first.

import { count, duration, element, figure, fixed, isNumber, say } from "./words.js";

/** Rows that are drawn until the reader asks for all: hundreds of workers would be drawn twice a second. */
const SHOWN = 60;

/** How bad a remark is; what is not known here is worth looking at. */
export function toneOf(remark) {
  if (/^(left|joined)/.test(remark)) return "note";
  if (/^(slow|score)/.test(remark)) return "warn";
  return "bad";
}

const TONES = new Map([["silent", "bad"], ["quarantine", "bad"], ...["left", "away", "", "starting"].map((state) => [state, "off"])]);
const stateTone = (state) => TONES.get(state) ?? "good";

const total = (reasons) => Object.values(reasons ?? {}).reduce((sum, times) => sum + times, 0);
const weight = { bad: 0, warn: 1, note: 3 };

/** The least is the most urgent. */
function urgency(worker) {
  const remarks = (worker.remarks ?? []).map((remark) => weight[toneOf(remark)]);
  return Math.min(2, ...remarks, stateTone(worker.state) === "bad" ? 0 : 2) + (worker.role === "evaluator" ? 0.5 : 0);
}

/** Those that need somebody's attention, the worst first: name, and the first remark with its tone. */
export function toLookAt(workers) {
  return Object.values(workers)
    .filter((worker) => urgency(worker) < 2)
    .sort((one, other) => urgency(one) - urgency(other) || byName.compare(one.name, other.name))
    .map((worker) => {
      const text = worker.remarks?.[0] ?? worker.state;
      return { name: worker.name, text, tone: worker.remarks?.length ? toneOf(text) : stateTone(worker.state) };
    });
}

const byName = new Intl.Collator("en", { numeric: true });

const COLUMNS = [
  { key: "name", title: "Worker", words: (worker) => worker.name, order: null },
  { key: "state", title: "State", order: (worker) => worker.state },
  { key: "remarks", title: "Remarks", order: (worker) => urgency(worker), first: true },
  { key: "updates", title: "Updates", number: true, order: (worker) => worker.updates ?? worker.sent, hint: "In the model, and their share of all" },
  { key: "contribution", title: "Contribution", number: true, order: (worker) => worker.contribution, hint: "As “fedmq contribution” found it last" },
  { key: "seconds", title: "s / update", number: true, order: (worker) => worker.seconds, words: (worker) => fixed(worker.seconds, 2) },
  { key: "staleness", title: "Staleness", number: true, order: (worker) => worker.staleness, words: (worker) => fixed(worker.staleness, 1) },
  { key: "loss", title: "Loss", number: true, order: (worker) => worker.loss, words: (worker) => fixed(worker.loss, 3) },
  { key: "cosine", title: "Cosine", number: true, order: (worker) => worker.cosine, words: (worker) => fixed(worker.cosine, 2), hint: "How far its updates point where all go: 1 the same way, below 0 against it" },
  { key: "rejected", title: "Rejected", number: true, order: (worker) => total(worker.rejected), words: (worker) => (total(worker.rejected) ? figure(total(worker.rejected)) : "–") },
  { key: "version", title: "Version", number: true, order: (worker) => worker.version, words: (worker) => figure(worker.version) },
  { key: "seen", title: "Heard", number: true, order: (worker) => worker.seen_seconds, words: (worker) => (isNumber(worker.seen_seconds) ? heard(worker.seen_seconds) : "never") },
];

const heard = (seconds) => (seconds < 3 ? "now" : `${duration(seconds)} ago`);

export class WorkersTable {
  constructor({ place, words, filter, more }) {
    this.place = place;
    this.words = words;
    this.filter = filter;
    this.more = more;
    this.sorted = { key: "remarks", isDown: false };
    this.all = false;
    this.workers = {};
    this.rows = new Map();
    filter.addEventListener("input", () => this.draw());
    more.addEventListener("click", () => {
      this.all = !this.all;
      this.draw();
    });
    this.body = element("tbody");
    this.heads = new Map(COLUMNS.map((column) => [column.key, this.#head(column)]));
    this.nothing = element("p", { class: "nothing" });
    this.table = element("table", { class: "workers" }, element("thead", {}, element("tr", {}, ...this.heads.values())), this.body);
    place.append(this.table, this.nothing);
  }

  show(workers) {
    this.workers = workers;
    this.draw();
  }

  draw() {
    const all = Object.values(this.workers);
    const wanted = this.filter.value.trim().toLowerCase();
    const found = all.filter(({ name }) => name.toLowerCase().includes(wanted)).sort(this.#order());
    const shown = this.all ? found : found.slice(0, SHOWN);
    this.facts = {
      updates: all.reduce((sum, worker) => sum + (worker.updates ?? worker.sent ?? 0), 0),
      slowest: Math.max(...all.map((worker) => worker.seconds).filter(isNumber), 0),
      largest: Math.max(...all.map((worker) => Math.abs(worker.contribution)).filter(isNumber), 0),
    };
    const isWorth = all.some((worker) => isNumber(worker.contribution));
    this.table.classList.toggle("no-contribution", !isWorth);
    this.table.hidden = shown.length === 0;
    this.nothing.hidden = shown.length > 0;
    say(this.nothing, all.length ? "No worker has this in its name." : "No worker has been heard yet.");
    say(this.words, this.#summary(all));
    for (const [key, head] of this.heads) {
      if (key === this.sorted.key) head.setAttribute("aria-sort", this.sorted.isDown ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    this.more.hidden = found.length <= SHOWN;
    say(this.more, this.all ? `Show ${SHOWN} only` : `Show all ${figure(found.length)}`);
    const rows = shown.map((worker) => this.#row(worker));
    for (const name of this.rows.keys()) if (!(name in this.workers)) this.rows.delete(name);
    // Rows that stay where they are are not touched, so that a selection or the focus stays too.
    rows.forEach((row, index) => {
      if (this.body.children[index] !== row) this.body.insertBefore(row, this.body.children[index] ?? null);
    });
    while (this.body.children.length > rows.length) this.body.lastElementChild.remove();
  }

  #summary(all) {
    const trainers = all.filter(({ role }) => role !== "evaluator");
    if (!trainers.length) return "";
    const here = trainers.filter(({ state }) => state === "quarantine" || stateTone(state) === "good").length;
    const odd = all.filter((worker) => urgency(worker) < 2).length;
    return `${figure(here)} of ${count(trainers.length, "worker")} here${odd ? `, ${odd} to look at` : ""}`;
  }

  #head(column) {
    const button = element("button", { type: "button", title: column.hint }, column.title);
    button.addEventListener("click", () => {
      this.sorted = { key: column.key, isDown: this.sorted.key === column.key ? !this.sorted.isDown : Boolean(column.number) };
      this.draw();
    });
    return element("th", { scope: "col", class: column.number ? `number of-${column.key}` : `of-${column.key}` }, button);
  }

  #order() {
    const { key, isDown } = this.sorted;
    const { order } = COLUMNS.find((column) => column.key === key);
    const names = (one, other) => byName.compare(one.name, other.name);
    if (!order) return isDown ? (one, other) => names(other, one) : names;
    const sign = isDown ? -1 : 1;
    return (one, other) => {
      const [left, right] = [order(one), order(other)];
      // What is not known stands at the end, whichever way.
      if ((left ?? null) === null || (right ?? null) === null) return ((left ?? null) === null) - ((right ?? null) === null) || names(one, other);
      return (left < right ? -sign : left > right ? sign : 0) || names(one, other);
    };
  }

  #row(worker) {
    let row = this.rows.get(worker.name);
    if (!row) {
      const cells = COLUMNS.map((column) =>
        column.key === "name"
          ? element("th", { scope: "row", class: "of-name" })
          : element("td", { class: column.number ? `number of-${column.key}` : `of-${column.key}`, "data-title": column.title }),
      );
      row = element("tr", {}, ...cells);
      row.drawn = {};
      this.rows.set(worker.name, row);
    }
    row.classList.toggle("odd", urgency(worker) < 1);
    COLUMNS.forEach((column, index) => this.#cell(row, row.children[index], column, worker));
    return row;
  }

  #cell(row, cell, column, worker) {
    const own = { name, state, remarks, updates, contribution, seconds }[column.key];
    const facts = own ? own(worker, this.facts) : { text: column.words(worker) };
    const known = JSON.stringify(facts);
    if (row.drawn[column.key] === known) return;
    row.drawn[column.key] = known;
    cell.replaceChildren(...(own ? own.draw(facts) : [facts.text]));
  }
}

// Cells that are more than a figure: what they show, and how it is drawn.

const name = (worker) => ({ text: worker.name, role: worker.role === "trainer" ? "" : worker.role });
name.draw = ({ text, role }) => [element("span", { class: "name", title: text }, text), role && element("span", { class: "role" }, role)].filter(Boolean);

const state = (worker) => ({ text: worker.state || "not heard", tone: stateTone(worker.state) });
state.draw = ({ text, tone }) => [element("span", { class: `dot ${tone}` }, text)];

const remarks = (worker) => ({ list: (worker.remarks ?? []).map((text) => [toneOf(text), text]) });
remarks.draw = ({ list }) => list.map(([tone, text]) => element("span", { class: `remark ${tone}` }, text));

const updates = (worker, facts) => {
  const number = worker.role === "evaluator" ? null : (worker.updates ?? worker.sent);
  return { number, share: facts.updates && isNumber(number) ? number / facts.updates : null };
};
updates.draw = ({ number, share }) => [
  figure(number),
  element("small", {}, isNumber(share) ? `${Math.round(share * 100)} %` : ""),
  bar(share ?? 0, "share"),
];

const contribution = (worker, facts) => ({ value: worker.contribution, part: facts.largest ? worker.contribution / facts.largest : 0 });
contribution.draw = ({ value, part }) => [isNumber(value) ? (value > 0 ? "+" : "") + figure(value, 3) : "–", bar(Math.abs(part || 0), part < 0 ? "against" : "share")];

const seconds = (worker, facts) => ({ text: fixed(worker.seconds, 2), part: facts.slowest && isNumber(worker.seconds) ? worker.seconds / facts.slowest : 0 });
seconds.draw = ({ text, part }) => [text, bar(part, "pace")];

/** A thin bar; the figure beside it says the same. */
function bar(part, kind) {
  const made = element("span", { class: `bar ${kind}`, "aria-hidden": "true" });
  made.style.setProperty("--part", String(Math.max(0, Math.min(1, part))));
  return made;
}
