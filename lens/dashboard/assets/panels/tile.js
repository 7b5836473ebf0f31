// One number of now with what it means: the row of tiles above the charts of a page.

import { element } from "../core/dom.js";

/** @param {{label: string, value: string, detail: string, missing?: boolean}} content */
export function tile({ label, value, detail, missing }) {
  return element("div", { class: "lens-tile", "data-missing": missing }, element("span", { class: "lens-tile-label" }, label), element("strong", {}, value), element("span", { class: "lens-tile-detail" }, detail));
}
