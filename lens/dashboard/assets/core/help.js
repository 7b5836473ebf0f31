// The dialog that says what the open page shows, how to read it, and which keys there are.

import { element } from "./dom.js";

const KEYS = [
  ["+  −", "zoom in and out"],
  ["0", "all steps"],
  ["/", "choose metric, ranks or step"],
  ["d", "dark or light"],
  ["← → ↑ ↓", "on a map: read it piece by piece; Enter follows a rank"],
  ["?", "this help"],
];
const READING = [
  "A step is one update of the model. Every rank takes part in it, so the slowest sets the pace of all.",
  "Drag across a chart to zoom; double-click for all steps. The address always leads back to what you see.",
  "What was not measured is written “n/a” with its reason, or left as a gap. It is never drawn as zero.",
  "A triangle ▲ marks a rank or card that the verdict names; a dashed line where its trouble began.",
  "“simulated” means that the cards' numbers come from a model driven by the real run, not from hardware.",
];

/** Opens it, or closes it if it is open. */
export function help(app) {
  const open = document.querySelector("dialog.lens-help");
  if (open) return open.close();
  const here = app.pages.find((page) => page.name === app.open?.name);
  const dialog = element(
    "dialog",
    { class: "lens-help", "aria-labelledby": "help-title" },
    element("h2", { id: "help-title" }, here ? `This page: ${here.title}` : "Help"),
    ...(here ? [element("p", {}, here.shows), panels(app.open.root)] : []),
    element("h3", {}, "Reading the pages"),
    element("ul", {}, ...READING.map((words) => element("li", {}, words))),
    element("h3", {}, "All pages"),
    element("dl", {}, ...app.pages.flatMap((page) => entry(`g ${page.key}`, element("b", {}, page.title), ` ${page.shows}`))),
    element("h3", {}, "Keys"),
    element("dl", {}, ...KEYS.flatMap(([key, what]) => entry(key, what))),
    element("form", { method: "dialog" }, element("button", { class: "lens-button" }, "Close")),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  dialog.scrollTop = 0;
  return undefined;
}

/** The open page's pictures, each with the sentence that stands above it. */
function panels(root) {
  const shown = [...root.querySelectorAll("[data-panel]")].filter((panel) => !panel.hidden);
  return element("ul", {}, ...shown.map((panel) => element("li", {}, element("b", {}, `${panel.dataset.title}. `), panel.querySelector("header p").textContent)));
}

function entry(key, ...what) {
  return [element("dt", {}, ...key.split("  ").map((part) => element("kbd", {}, part))), element("dd", {}, ...what)];
}
