// A line chart in SVG: a few curves over one axis, and a cursor that pointer and arrow keys move.

import { clock, element, figure, isNumber, say } from "./words.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const MARGIN = { top: 8, right: 12, bottom: 22, left: 48 };
const HEIGHT = 190;

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Round numbers that divide from `low` to `high` into about `wanted` parts. */
export function ticks(low, high, wanted) {
  const raw = (high - low) / wanted;
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999) ?? 10);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) found.push(Number((index * step).toPrecision(12)));
  return found;
}

/** Powers of ten, and between them 2 and 5 where there is room. */
function logarithmicTicks(low, high) {
  const found = [];
  const factors = Math.log10(high / low) > 3 ? [1] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  const every = Math.ceil(found.length / 6);
  return found.filter((_, index) => index % every === 0);
}

const AXES = {
  version: { of: (point) => point[0], label: (value) => figure(value), words: (value) => `version ${figure(value)}` },
  time: { of: (point) => point[1], label: (value) => clock(value), words: (value) => `at ${clock(value)}` },
};

/** Times at which a clock has a round figure. */
function timeTicks(low, high, wanted) {
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];
  const step = steps.find((seconds) => (high - low) / seconds <= wanted) ?? Math.ceil((high - low) / wanted / 86400) * 86400;
  const shift = new Date(low * 1000).getTimezoneOffset() * 60;
  const found = [];
  for (let value = Math.ceil((low - shift) / step) * step + shift; value <= high; value += step) found.push(value);
  return found;
}

function shortClock(value, span) {
  const text = clock(value);
  return span > 600 && text.endsWith(":00") ? text.slice(0, -3) : text;
}

/** The index of the point nearest to `x`; points are in order. */
function nearest(points, of, x) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (of(points[middle]) < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - of(points[low - 1]) < of(points[low]) - x ? low - 1 : low;
}

/** From so many points on a curve that jumps is drawn faintly, and its moving mean over it. */
const SMOOTH_FROM = 80;

/** The mean of each place and its neighbours, as many on either side, so that both ends stay where they are. */
function smoothed(places) {
  const most = Math.ceil(places.length / 60);
  return places.map(([x, value], index) => {
    if (value === null) return [x, null];
    const reach = Math.min(most, index, places.length - 1 - index);
    const near = places.slice(Math.max(0, index - reach), index + reach + 1).map((place) => place[1]).filter((other) => other !== null);
    return [x, near.reduce((sum, other) => sum + other, 0) / near.length];
  });
}

/** An SVG path through `places`, with gaps where there is no value. */
function line(places, at) {
  let path = "";
  let isDown = false;
  for (const place of places) {
    if (place[1] !== null) path += `${isDown ? "L" : "M"}${at(place)}`;
    isDown = place[1] !== null;
  }
  return path;
}

export class Chart {
  /**
   * `zero`: whether the vertical axis begins there; `smooth`: whether a mean is drawn over many points. `moved(axis value or null, words)` is called when the reader moves
   * the cursor.
   */
  constructor({ title, zero = false, smooth = false, unit = "", moved = () => {} }) {
    this.title = title;
    this.zero = zero;
    this.smooth = smooth;
    this.unit = unit;
    this.moved = moved;
    this.curves = [];
    this.axis = "version";
    this.logarithmic = false;
    this.cursor = null;
    this.legend = element("ul", { class: "legend" });
    this.svg = drawn("svg", { role: "img", tabindex: "0", height: String(HEIGHT) });
    this.nothing = element("p", { class: "nothing" }, "no figures yet");
    this.root = element(
      "figure",
      { class: "chart" },
      element("figcaption", {}, element("h3", {}, title), this.legend),
      element("div", { class: "canvas" }, this.svg, this.nothing),
    );
    this.width = 0;
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width !== this.width) {
        this.width = width;
        this.draw();
      }
    }).observe(this.svg.parentElement);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerdown", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.moved(null, ""));
    this.svg.addEventListener("blur", () => this.moved(null, ""));
    this.svg.addEventListener("keydown", (event) => this.#key(event));
  }

  /** `curves`: [{name, points: [[version, time, value], …]}]. */
  show(curves, axis, logarithmic = false) {
    const same =
      axis === this.axis && logarithmic === this.logarithmic && curves.length === this.curves.length &&
      curves.every((curve, index) => curve.name === this.curves[index].name && curve.points === this.curves[index].points);
    if (same) return;
    this.curves = curves;
    this.axis = axis;
    this.logarithmic = logarithmic;
    this.draw();
  }

  /** Where the cursor is, on the axis; null for nowhere. */
  point(cursor) {
    if (cursor === this.cursor) return;
    this.cursor = cursor;
    this.#drawCursor();
  }

  draw() {
    const axis = AXES[this.axis];
    this.shown = this.curves.map(({ name, points, quiet }) => ({
      name, quiet,
      points: points.filter((point) => isNumber(axis.of(point)) && !(this.logarithmic && point[2] !== null && point[2] <= 0)),
    }));
    const all = this.shown.flatMap(({ points }) => points);
    const values = all.map((point) => point[2]).filter(isNumber);
    this.nothing.hidden = values.length > 0;
    this.svg.toggleAttribute("hidden", values.length === 0);
    this.svg.setAttribute("aria-label", this.#summary(axis));
    this.#drawLegend();
    if (!values.length || this.width < 80) return;
    this.#scale(axis, all, values);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.setAttribute("width", String(this.width));
    this.cursorMark = drawn("g", { class: "cursor" });
    this.svg.replaceChildren(...this.#grid(axis), ...this.shown.map((curve, index) => this.#curve(curve, index, axis)), this.cursorMark);
    this.#drawCursor();
  }

  #scale(axis, all, values) {
    let [left, right] = [Infinity, -Infinity];
    for (const point of all) {
      left = Math.min(left, axis.of(point));
      right = Math.max(right, axis.of(point));
    }
    if (left === right) [left, right] = [left - 1, right + 1];
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    const inner = { width: this.width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    let height;
    this.cut = null;
    if (this.logarithmic) {
      if (low === high) [low, high] = [low / 2, high * 2];
      height = (value) => Math.log(value / low) / Math.log(high / low);
    } else {
      if (this.zero) low = Math.min(low, 0);
      // The first round waits for everybody: one such value must not press the others flat.
      const usual = values.toSorted((one, other) => one - other)[Math.floor(values.length * 0.97)];
      this.cut = this.zero && values.length > 20 && high > 3 * usual && usual > 0 ? high : null;
      if (this.cut !== null) high = 1.5 * usual;
      if (low === high) [low, high] = [low - (this.zero && low === 0 ? 0 : Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
      const room = (high - low) * 0.06;
      high += room;
      if (!(this.zero && low === 0)) low -= room;
      height = (value) => (value - low) / (high - low);
    }
    this.range = { left, right, low, high };
    this.x = (value) => MARGIN.left + ((value - left) / (right - left)) * inner.width;
    this.y = (value) => MARGIN.top + (1 - Math.min(1.1, height(value))) * inner.height;
    this.back = (x) => left + ((x - MARGIN.left) / inner.width) * (right - left);
  }

  #grid(axis) {
    const { left, right, low, high } = this.range;
    const parts = [];
    for (const value of this.logarithmic ? logarithmicTicks(low, high) : ticks(low, high, 4)) {
      const y = this.y(value).toFixed(1);
      parts.push(
        drawn("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y }),
        drawn("text", { class: "label", x: MARGIN.left - 8, y, dy: "0.32em", "text-anchor": "end" }, figure(value, 3)),
      );
    }
    if (this.cut !== null) {
      parts.push(drawn("text", { class: "label", x: this.width - MARGIN.right, y: MARGIN.top + 10, "text-anchor": "end" }, `up to ${figure(this.cut, 3)} ↑`));
    }
    const wanted = Math.max(2, Math.floor(this.width / 110));
    const places = this.axis === "time" ? timeTicks(left, right, wanted) : ticks(left, right, wanted).filter(Number.isInteger);
    for (const value of places) {
      const x = this.x(value);
      const anchor = x > this.width - 40 ? "end" : x < MARGIN.left + 10 ? "start" : "middle";
      const text = this.axis === "time" ? shortClock(value, right - left) : axis.label(value);
      parts.push(drawn("text", { class: "label", x: x.toFixed(1), y: HEIGHT - 6, "text-anchor": anchor }, text));
    }
    return parts;
  }

  #curve({ points, quiet }, index, axis) {
    const at = ([x, y]) => `${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
    const group = drawn("g", { class: `curve tone-${index}${quiet ? " dashed" : ""}` });
    const places = points.map((point) => [axis.of(point), isNumber(point[2]) ? point[2] : null]);
    const isSmooth = this.smooth && !quiet && places.length >= SMOOTH_FROM;
    if (isSmooth) group.append(drawn("path", { class: "raw", d: line(places, at) }));
    group.append(drawn("path", { d: line(isSmooth ? smoothed(places) : places, at) }));
    const last = places.findLast(([, value]) => value !== null);
    if (last) group.append(drawn("circle", { cx: this.x(last[0]).toFixed(1), cy: this.y(last[1]).toFixed(1), r: 2.5 }));
    return group;
  }

  #drawLegend() {
    if (this.legend.children.length !== this.shown.length) {
      this.legend.replaceChildren(
        ...this.shown.map((_, index) => element("li", { class: `tone-${index}` }, element("span", { class: "name" }), element("span", { class: "value" }))),
      );
    }
    this.shown.forEach(({ name, points, quiet }, index) => {
      const [label, value] = this.legend.children[index].children;
      this.legend.children[index].classList.toggle("dashed", Boolean(quiet));
      this.legend.children[index].classList.toggle("alone", !name && this.shown.length === 1);
      say(label, name);
      const at = this.cursor === null || !points.length ? points.length - 1 : nearest(points, AXES[this.axis].of, this.cursor);
      say(value, at < 0 ? "–" : figure(points[at][2]) + (isNumber(points[at][2]) ? this.unit : ""));
    });
  }

  #drawCursor() {
    if (!this.cursorMark || !this.range) return;
    const axis = AXES[this.axis];
    const isInside = this.cursor !== null && this.cursor >= this.range.left && this.cursor <= this.range.right;
    const marks = [];
    if (isInside) {
      const x = this.x(this.cursor).toFixed(1);
      const anchor = this.x(this.cursor) > this.width - 60 ? "end" : this.x(this.cursor) < MARGIN.left + 40 ? "start" : "middle";
      marks.push(
        drawn("line", { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
        drawn("text", { class: "label", x, y: HEIGHT - 6, "text-anchor": anchor }, axis.label(this.cursor)),
      );
      this.shown.forEach(({ points }, index) => {
        const point = points[nearest(points, axis.of, this.cursor)];
        if (point && isNumber(point[2])) {
          marks.push(drawn("circle", { class: `tone-${index}`, cx: this.x(axis.of(point)).toFixed(1), cy: this.y(point[2]).toFixed(1), r: 3.5 }));
        }
      });
    }
    this.cursorMark.replaceChildren(...marks);
    this.#drawLegend();
  }

  /** All places on the axis at which a curve has a point. */
  #places() {
    const axis = AXES[this.axis];
    return [...new Set(this.shown.flatMap(({ points }) => points.map(axis.of)))].sort((one, other) => one - other);
  }

  #point(event) {
    if (!this.range) return;
    const wanted = this.back(event.clientX - this.svg.getBoundingClientRect().left);
    const longest = this.shown.reduce((one, other) => (other.points.length > one.points.length ? other : one), { points: [] });
    if (longest.points.length) {
      const axis = AXES[this.axis];
      this.moved(axis.of(longest.points[nearest(longest.points, axis.of, wanted)]), "");
    }
  }

  #key(event) {
    const places = this.#places();
    if (!places.length) return;
    const at = this.cursor === null ? places.length - 1 : places.findIndex((place) => place >= this.cursor);
    const stride = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: places.length - 1 }[event.key];
    if (event.key === "Escape") this.moved(null, "");
    if (to === undefined) return;
    event.preventDefault();
    const place = places[Math.max(0, Math.min(places.length - 1, to))];
    this.moved(place, `${AXES[this.axis].words(place)}: ${this.#wordsAt(place)}`);
  }

  #wordsAt(place) {
    const of = AXES[this.axis].of;
    return this.shown
      .filter(({ points }) => points.length)
      .map(({ name, points }) => `${name} ${figure(points[nearest(points, of, place)][2])}${this.unit}`)
      .join(", ");
  }

  #summary(axis) {
    const parts = this.shown
      .map(({ name, points }) => ({ name, points: points.filter((point) => isNumber(point[2])) }))
      .filter(({ points }) => points.length)
      .map(({ name, points }) => {
        const [first, last] = [points[0], points[points.length - 1]];
        return `${name} from ${figure(first[2])} (${axis.words(axis.of(first))}) to ${figure(last[2])}${this.unit} (${axis.words(axis.of(last))})`;
      });
    return `${this.title}: ${parts.join("; ") || "no figures yet"}. Arrow keys move along the curve.`;
  }
}
