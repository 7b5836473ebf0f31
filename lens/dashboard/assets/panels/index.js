// What draws each kind of panel.

import { BandPanel, LinePanel, RanksPanel, RatePanel } from "./lines.js";
import { EnvelopePanel } from "../pages/memory.js";
import { ExpertDropsPanel, ExpertMapPanel, ExpertShapePanel } from "../pages/experts.js";
import { FindingsPanel } from "./findings.js";
import { GroupsPanel, PairsPanel } from "../pages/communication.js";
import { HardwarePanel } from "../pages/hardware.js";
import { HeatmapPanel } from "./heatmap.js";
import { LanesPanel } from "./lanes.js";
import { LedgerPanel } from "./ledger.js";
import { StackPanel } from "./stack.js";

/** What draws each kind of panel that lens.dashboard.components.panel names. */
export const PANELS = {
  band: BandPanel,
  rate: RatePanel,
  line: LinePanel,
  ranks: RanksPanel,
  heatmap: HeatmapPanel,
  ledger: LedgerPanel,
  findings: FindingsPanel,
  stack: StackPanel,
  lanes: LanesPanel,
  pairs: PairsPanel,
  groups: GroupsPanel,
  "expert-map": ExpertMapPanel,
  "expert-shape": ExpertShapePanel,
  "expert-drops": ExpertDropsPanel,
  hardware: HardwarePanel,
  envelope: EnvelopePanel,
};
