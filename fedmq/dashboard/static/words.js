// Words, figures and elements. Whatever comes from outside becomes text and nothing else.

/** An element with attributes and children; strings become text nodes, `undefined` and `false` are left out. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false && value !== null) made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== undefined && child !== null && child !== false));
  return made;
}

/** Whether it is a number that can be shown, and that differs from another by a number. */
export const isNumber = (value) => typeof value === "number" && Math.abs(value) <= 1e300;

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** A number in four digits or so; a dash where there is none. */
export function figure(value, digits = 4) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return grouped.format(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return grouped.format(value);
  return String(Number(value.toPrecision(digits)));
}

/** A number with as many decimals as make its column line up. */
export function fixed(value, decimals) {
  if (!isNumber(value)) return "–";
  return Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 10 ** -decimals) ? figure(value, 3) : value.toFixed(decimals);
}

export function bytes(value) {
  if (!isNumber(value)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (Math.abs(value) >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(value) : Number(value.toPrecision(3))} ${units[unit]}`;
}

/** Seconds as people say them: 8 s, 3 min, 2 h 10 min. */
export function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 1) return "now";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

const clockOf = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dayOf = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

/** Seconds since 1970, if a calendar has that moment; else null. */
export function momentOf(seconds) {
  const moment = new Date(isNumber(seconds) ? seconds * 1000 : NaN);
  return Number.isNaN(moment.getTime()) ? null : moment;
}

/** Seconds since 1970 as the reader's time of day, with the day if it is not today. */
export function clock(seconds, now = Date.now() / 1000) {
  const moment = momentOf(seconds);
  if (!moment) return "–";
  const day = dayOf.format(moment);
  return day === dayOf.format(new Date(now * 1000)) ? clockOf.format(moment) : `${day}, ${clockOf.format(moment)}`;
}

/** One thing, two things. */
export const count = (number, word, words = `${word}s`) => `${figure(number)} ${number === 1 ? word : words}`;

/** Set an element's text, if it is another one: what does not change is not read out again. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}
