// Colours: Okabe–Ito for lines, Cividis for maps; both can be told apart with any kind of colour vision.

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const LINES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#333333"],
  dark: ["#56b4e9", "#e69f00", "#2fc799", "#e79fc6", "#f0e442", "#e8e8e8"],
};
/** Beside its colour every line has its own dashes. */
export const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [1, 4]];

export function scheme() {
  return document.documentElement.getAttribute("data-mantine-color-scheme") === "dark" ? "dark" : "light";
}

export function lines() {
  return LINES[scheme()];
}

const named = { light: new Map(), dark: new Map() };

/** A colour named in lens.css, as it is now; asking the browser each time would cost more than the drawing. */
export function css(name) {
  const known = named[scheme()];
  let colour = known.get(name);
  if (colour === undefined) {
    colour = getComputedStyle(document.documentElement).getPropertyValue(`--lens-${name}`).trim();
    known.set(name, colour);
  }
  return colour;
}

export function transparent(hex, alpha) {
  const value = parseInt(hex.slice(1), 16);
  return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${alpha})`;
}

/** 256 Cividis colours as little-endian RGBA words, ready for ImageData. */
export const cividis = (() => {
  const stops = CIVIDIS.map((hex) => parseInt(hex.slice(1), 16)).map((v) => [v >> 16, (v >> 8) & 255, v & 255]);
  const table = new Uint32Array(256);
  for (let index = 0; index < 256; index += 1) {
    const place = (index / 255) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(place));
    const [r, g, b] = stops[low].map((value, channel) => Math.round(value + (stops[low + 1][channel] - value) * (place - low)));
    table[index] = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  return table;
})();

export const cividisGradient = `linear-gradient(to right, ${CIVIDIS.join(", ")})`;
