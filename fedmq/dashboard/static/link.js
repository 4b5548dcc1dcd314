// The stream from the server: everything once, then what has changed.

const SILENT_SECONDS = 30;
const AGAIN_SECONDS = 2;

/** What `patch` makes of `target`: RFC 7396, where null takes a key away. */
export function merged(target, patch) {
  // Without a prototype: a worker may be called __proto__.
  const result = Object.assign(Object.create(null), target);
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete result[key];
    else if (typeof value === "object" && !Array.isArray(value)) {
      const before = result[key];
      result[key] = merged(before && typeof before === "object" && !Array.isArray(before) ? before : {}, value);
    } else result[key] = value;
  }
  return result;
}

/** The state after a change; `state` itself stays as it is. */
export function changed(state, change, most) {
  const series = { ...state.series };
  for (const [name, tail] of Object.entries(change.series ?? {})) {
    if (tail === null) delete series[name];
    else series[name] = [...(series[name] ?? []).slice(0, tail.keep), ...tail.points];
  }
  return {
    view: change.view ? merged(state.view, change.view) : state.view,
    series,
    log: change.log ? [...state.log, ...change.log].slice(-most) : state.log,
  };
}

/** Follow the stream at `address`; `told(state)` and `linked(isUp)` are called with what comes. */
export function follow(address, { told, linked, most = 300 }) {
  let state = { view: {}, series: {}, log: [] };
  let source;
  let heard = Date.now();

  function open() {
    source?.close();
    heard = Date.now();
    source = new EventSource(address);
    source.addEventListener("open", () => linked(true));
    source.addEventListener("error", () => {
      linked(false);
      // After a refusal the browser does not try again by itself.
      if (source.readyState === EventSource.CLOSED) setTimeout(open, AGAIN_SECONDS * 1000);
    });
    const take = (change) => (event) => {
      heard = Date.now();
      const data = JSON.parse(event.data);
      state = change ? changed(state, data, most) : { view: merged({}, data.view), series: data.series, log: data.log };
      told(state);
    };
    source.addEventListener("whole", take(false));
    source.addEventListener("change", take(true));
    source.addEventListener("alive", () => {
      heard = Date.now();
    });
  }

  open();
  // A connection can die without a word, for one when the machine sleeps.
  setInterval(() => {
    if (source.readyState !== EventSource.CLOSED && Date.now() - heard > SILENT_SECONDS * 1000) {
      linked(false);
      open();
    }
  }, 5000);
}
