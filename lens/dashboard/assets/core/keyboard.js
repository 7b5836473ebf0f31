// Keys.

import { help } from "./help.js";

const GO_MS = 4000; // a busy browser may take its time between two keys

export function listen(app) {
  let goUntil = 0;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, textarea")) return;
    const { key } = event;
    const now = performance.now();
    if (now < goUntil) {
      goUntil = 0;
      if (app.goByKey(key)) event.preventDefault();
      return;
    }
    const actions = {
      g: () => (goUntil = now + GO_MS),
      "?": () => help(app),
      "+": () => app.zoomBy(0.5),
      "=": () => app.zoomBy(0.5),
      "-": () => app.zoomBy(2),
      "−": () => app.zoomBy(2),
      0: () => app.zoomTo(null),
      "/": () => document.querySelector("[data-page]:not([hidden]) select, [data-page]:not([hidden]) input")?.focus(),
      d: () => app.toggleScheme(),
    };
    if (!(key in actions)) return;
    if (key === "/") event.preventDefault();
    actions[key]();
  });
}
