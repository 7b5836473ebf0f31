// The phases of a step: their names, colours and order, the same in the stack and in the lanes.

import { css } from "./palette.js";

/** name → [what a reader calls it, colour, colour of text on it] */
const PHASES = {
  data: ["data", "#009e73", "#00140e"],
  h2d: ["copy to device", "#7fc8a9", "#04201a"],
  forward: ["forward", "#0072b2", "#ffffff"],
  backward: ["backward", "#56b4e9", "#04202f"],
  optimizer: ["optimizer", "#cc79a7", "#200815"],
  checkpoint: ["checkpoint", "#f0e442", "#211f00"],
  eval: ["evaluation", "#8a63b8", "#ffffff"],
  logging: ["logging", "#8b6f4e", "#ffffff"],
  rollout: ["rollout", "#e69f00", "#1f1500"],
  reward: ["reward", "#d55e00", "#ffffff"],
  update: ["update", "#3d8fa8", "#04181f"],
  other: ["other", "#6b7682", "#ffffff"],
};
export const BETWEEN = "between phases";
export const PHASE_NAMES = Object.keys(PHASES);

export function phaseWords(name) {
  return PHASES[name]?.[0] ?? name;
}

/** @returns {[string, string]} ground and text */
export function phaseColours(name) {
  if (name === BETWEEN) return [css("between"), css("text")];
  return (PHASES[name] ?? PHASES.other).slice(1);
}
