// One binary websocket a page: what arrives is handed on, a broken connection resumes from its cursor.

const FIRST_WAIT_MS = 400;
const LONGEST_WAIT_MS = 8000;

/** Header and blocks of a frame; each block has its columns as typed arrays. */
export function decodeFrame(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let offset = 4 + length;
  const blocks = header.blocks.map(({ metric, labels, n }) => {
    const steps = new Int32Array(buffer, offset, n);
    const ranks = new Int32Array(buffer, offset + 4 * n, n);
    const values = new Float32Array(buffer, offset + 8 * n, n);
    offset += 12 * n;
    return { metric, labels: labels ?? null, steps, ranks, values };
  });
  return { header, blocks };
}

export class Feed {
  /**
   * @param {string} run
   * @param {(frame: {header: object, blocks: object[]}) => void} onFrame
   * @param {(connected: boolean) => void} onState
   */
  constructor(run, onFrame, onState) {
    this.run = run;
    this.onFrame = onFrame;
    this.onState = onState;
    this.metrics = new Set();
    this.cursor = null;
    this.wait = FIRST_WAIT_MS;
    this.closed = false;
  }

  open() {
    if (this.closed) return;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const cursor = this.cursor === null ? "" : `?cursor=${this.cursor}`;
    const socket = new WebSocket(`${scheme}://${location.host}/api/v1/runs/${encodeURIComponent(this.run)}/live${cursor}`);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.wait = FIRST_WAIT_MS;
      this.onState(true);
      this.tell();
    };
    socket.onmessage = (message) => {
      if (typeof message.data === "string") return;
      const frame = decodeFrame(message.data);
      this.cursor = frame.header.cursor;
      this.onFrame(frame);
    };
    socket.onclose = () => {
      if (this.closed) return;
      this.onState(false);
      this.timer = setTimeout(() => this.open(), this.wait * (0.75 + Math.random() / 2));
      this.wait = Math.min(LONGEST_WAIT_MS, this.wait * 2);
    };
    this.socket = socket;
  }

  /** Says which metrics the open charts need. */
  subscribe(metrics) {
    const wanted = new Set(metrics);
    if (wanted.size === this.metrics.size && [...wanted].every((metric) => this.metrics.has(metric))) return;
    this.metrics = wanted;
    this.tell();
  }

  tell() {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ subscribe: [...this.metrics] }));
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.socket?.close();
  }
}
