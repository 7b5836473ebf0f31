// Keys, and the dialog that lists them and says how to read the pages.

import { element } from "./dom.js";

const GO_MS = 1500;

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

export function help(app) {
  const open = document.querySelector("dialog.lens-help");
  if (open) return open.close();
  const keys = [
    ...app.pages.map((page) => [`g ${page.key}`, page.title]),
    ["+  −", "zoom in and out"],
    ["0", "all steps"],
    ["/", "choose metric or ranks"],
    ["d", "dark or light"],
    ["← → ↑ ↓  Enter", "on the map: read cells, follow a rank"],
    ["?", "this help"],
  ];
  const dialog = element(
    "dialog",
    { class: "lens-help", "aria-labelledby": "help-title" },
    element("h2", { id: "help-title" }, "Keys"),
    element("dl", {}, ...keys.flatMap(([key, what]) => [element("dt", {}, ...key.split("  ").map((part) => element("kbd", {}, part))), element("dd", {}, what)])),
    element("h2", {}, "Reading the pages"),
    element(
      "ul",
      {},
      element("li", {}, "A step is one update of the model. Every rank takes part in it, so the slowest sets the pace of all."),
      element("li", {}, "Drag across a chart to zoom; double-click for all steps. The address always leads back to what you see."),
      element("li", {}, "What was not measured is written “n/a” with its reason, or left as a gap. It is never drawn as zero."),
      element("li", {}, "“simulated” means that the cards' numbers come from a model driven by the real run, not from hardware."),
    ),
    element("form", { method: "dialog" }, element("button", { class: "lens-button" }, "Close")),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return undefined;
}
