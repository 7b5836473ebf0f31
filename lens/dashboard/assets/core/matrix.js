// Rank × step values in columns of `width` steps each: the one form that charts and heat maps draw from.
// Each cell keeps the highest and the mean value of its steps, so that pooling never hides a single slow step.

/** Columns for which a rank may be behind the others before it is no longer waited for. */
const PATIENCE = 20;

export class Matrix {
  /** @param {{from: number, width?: number, to?: number|null, capacity?: number}} shape `to`: later steps are not taken. */
  constructor({ from, width = 1, to = null, capacity = 1200 }) {
    this.from = from;
    this.width = width;
    this.to = to;
    this.capacity = capacity;
    this.columns = 0;
    this.room = 256;
    this.rows = [];
    this.rowOf = new Map();
    this.lastStep = null;
    this.notFinite = null;
    this.stale = 0;
    this.reduced = { x: [], median: [], max: [], min: [] };
  }

  /** From two heat map replies that differ in their pooling (the same one twice where a column is one step). */
  static fromHeatmap(highest, mean, to) {
    const matrix = new Matrix({ from: highest.from, width: highest.width, to });
    const columns = highest.columns;
    matrix.reserve(columns);
    matrix.columns = columns;
    highest.rows.forEach((rank, index) => {
      const row = matrix.row(rank);
      row.max.set(highest.values.subarray(index * columns, (index + 1) * columns));
      row.mean.set(mean.values.subarray(index * columns, (index + 1) * columns));
      for (let column = 0; column < columns; column += 1) {
        if (row.mean[column] === row.mean[column]) row.count[column] = matrix.width;
        if (!Number.isFinite(row.max[column]) && row.max[column] === row.max[column]) matrix.noteNotFinite(row, column);
      }
      row.settled = highest.to;
    });
    matrix.lastStep = matrix.rows.length ? Math.min(highest.to, matrix.from + columns * matrix.width - 1) : null;
    return matrix;
  }

  /** From a series reply; `points` is what was asked for. */
  static fromSeries(reply, range, points) {
    const steps = reply.series.flatMap((series) => [series.x[0], series.x[series.x.length - 1]]).filter((x) => x !== undefined);
    const from = range ? range[0] : steps.length ? Math.min(...steps) : 0;
    const last = steps.length ? Math.max(...steps) : from;
    const matrix = new Matrix({ from, width: Math.max(1, Math.ceil((last - from + 1) / points)), to: range ? range[1] : null });
    for (const series of reply.series) {
      series.x.forEach((step, index) => {
        matrix.put(step, series.rank ?? -1, series.mean[index]);
        matrix.raise(step, series.rank ?? -1, series.max[index]);
      });
    }
    return matrix;
  }

  /** The server writes infinity where all it was given was no finite number. */
  noteNotFinite(row, column) {
    row.max[column] = row.mean[column] = NaN;
    row.count[column] = 0;
    this.notFinite = Math.min(this.notFinite ?? Infinity, this.stepOf(column));
  }

  /** The row of a rank, made where there is none; rows stay in the order of ranks. */
  row(rank) {
    let row = this.rowOf.get(rank);
    if (row) return row;
    const blank = () => new Float32Array(this.room).fill(NaN);
    row = { rank, max: blank(), mean: blank(), count: new Uint32Array(this.room), settled: -1, lastStep: -1, lastValue: NaN };
    this.rowOf.set(rank, row);
    this.rows.push(row);
    this.rows.sort((a, b) => a.rank - b.rank);
    return row;
  }

  reserve(columns) {
    if (columns <= this.room) return;
    while (this.room < columns) this.room *= 2;
    for (const row of this.rows) {
      for (const name of ["max", "mean"]) {
        const grown = new Float32Array(this.room).fill(NaN);
        grown.set(row[name]);
        row[name] = grown;
      }
      const counts = new Uint32Array(this.room);
      counts.set(row.count);
      row.count = counts;
    }
  }

  /** Halves the number of columns: two neighbours become one. */
  merge() {
    const half = Math.ceil(this.columns / 2);
    for (const row of this.rows) {
      for (let column = 0; column < half; column += 1) {
        const [a, b] = [2 * column, 2 * column + 1];
        const [countA, countB] = [row.count[a], b < this.columns ? row.count[b] : 0];
        const [meanA, meanB] = [countA ? row.mean[a] * countA : 0, countB ? row.mean[b] * countB : 0];
        row.count[column] = countA + countB;
        row.mean[column] = countA + countB ? (meanA + meanB) / (countA + countB) : NaN;
        row.max[column] = b < this.columns ? larger(row.max[a], row.max[b]) : row.max[a];
      }
      row.max.fill(NaN, half);
      row.mean.fill(NaN, half);
      row.count.fill(0, half);
      row.settled = Math.max(row.settled, row.lastStep);
    }
    this.columns = half;
    this.width *= 2;
    this.stale = 0;
  }

  columnFor(step) {
    if (step < this.from || (this.to !== null && step > this.to)) return -1;
    let column = Math.floor((step - this.from) / this.width);
    while (column >= this.capacity) {
      this.merge();
      column = Math.floor((step - this.from) / this.width);
    }
    if (column >= this.columns) {
      this.reserve(column + 1);
      this.columns = column + 1;
    }
    return column;
  }

  /** Takes one value; the same cell may come again, with a later sum of the same step. */
  put(step, rank, value) {
    const column = this.columnFor(step);
    if (column < 0) return;
    const row = this.row(rank);
    this.lastStep = Math.max(this.lastStep ?? step, step);
    this.stale = Math.min(this.stale, column);
    if (value === null || value === undefined) return;
    if (!Number.isFinite(value)) {
      this.notFinite = this.notFinite === null ? step : Math.min(this.notFinite, step);
      return;
    }
    row.max[column] = larger(row.max[column], value);
    if (this.width === 1) {
      row.max[column] = row.mean[column] = value;
      row.count[column] = 1;
    } else if (step === row.lastStep) {
      row.mean[column] += (value - row.lastValue) / row.count[column];
    } else if (step > row.settled) {
      const count = row.count[column];
      row.mean[column] = count ? (row.mean[column] * count + value) / (count + 1) : value;
      row.count[column] = count + 1;
    }
    if (step >= row.lastStep) {
      row.lastStep = step;
      row.lastValue = value;
    }
  }

  /** Lets the highest value of a cell know of one that its mean already contains. */
  raise(step, rank, value) {
    const column = this.columnFor(step);
    if (column >= 0 && Number.isFinite(value)) this.row(rank).max[column] = larger(this.row(rank).max[column], value);
  }

  /** First step of a column. */
  stepOf(column) {
    return this.from + column * this.width;
  }

  columnOf(step) {
    const column = Math.floor((step - this.from) / this.width);
    return column >= 0 && column < this.columns ? column : -1;
  }

  /** Median of the ranks' means, highest and lowest value of each column; only what changed is computed again. */
  reduce() {
    const { x, median, max, min } = this.reduced;
    for (const part of [x, median, max, min]) part.length = Math.min(part.length, this.stale);
    const values = [];
    for (let column = this.stale; column < this.columns; column += 1) {
      values.length = 0;
      let highest = NaN;
      for (const row of this.rows) {
        const mean = row.mean[column];
        if (mean === mean) values.push(mean);
        highest = larger(highest, row.max[column]);
      }
      values.sort((a, b) => a - b);
      x.push(this.stepOf(column));
      median.push(values.length ? middle(values) : null);
      min.push(values.length ? values[0] : null);
      max.push(highest === highest ? highest : null);
    }
    this.stale = this.columns;
    return this.reduced;
  }

  /** The newest column that all ranks have reached or, where one stays behind, the newest that half of them have; or -1. */
  newest() {
    let half = -1;
    for (let column = this.columns - 1; column >= 0; column -= 1) {
      const known = this.rows.filter((row) => row.mean[column] === row.mean[column]).length;
      if (known && known === this.rows.length) return column;
      if (half < 0 && known && known * 2 >= this.rows.length) half = column;
      if (half >= 0 && half - column > PATIENCE) break;
    }
    return half;
  }
}

/** Median of sorted numbers. */
export function middle(sorted) {
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** Rolling median over about a fortieth of the values, at least 5: what remains when single spikes are ignored. */
export function trend(values) {
  const half = Math.max(2, Math.round(values.length / 80));
  const sorted = [];
  const place = (value) => {
    let [low, high] = [0, sorted.length];
    while (low < high) {
      const centre = (low + high) >> 1;
      if (sorted[centre] < value) low = centre + 1;
      else high = centre;
    }
    return low;
  };
  const add = (value) => value !== undefined && value !== null && sorted.splice(place(value), 0, value);
  const drop = (value) => value !== undefined && value !== null && sorted.splice(place(value), 1);
  for (let index = 0; index < half; index += 1) add(values[index]);
  return values.map((value, index) => {
    add(values[index + half]);
    drop(values[index - half - 1]);
    return value === null || sorted.length < 3 ? null : middle(sorted);
  });
}

function larger(a, b) {
  return a >= b || b !== b ? a : b;
}

/** Highest median of a matrix's rows: the rank to look at first. */
export function slowestRank(matrix) {
  let [slowest, highest] = [null, -Infinity];
  for (const row of matrix.rows) {
    const values = [...row.mean.subarray(0, matrix.columns)].filter((value) => value === value).sort((a, b) => a - b);
    if (values.length && middle(values) > highest) [slowest, highest] = [row.rank, middle(values)];
  }
  return slowest;
}
