// Arrays as lines over the frames, with a cursor at the current one. Dimensions are shown and hidden by their names.

import { el, svg } from "./dom.js";

const WIDTH = 1000;
const HEIGHT = 120;
const SHOWN_AT_FIRST = 8;
const HUES = [214, 28, 150, 350, 272, 52, 190, 318];

export class Plot {
  // `seek(frame)` is called while the plot is clicked or dragged.
  constructor(series, lastFrame, seek) {
    Object.assign(this, { series, lastFrame: Math.max(1, lastFrame), shown: new Set(), frame: 0 });
    const shape = `${series.shape.join(" × ")} ${series.dtype}`;
    const notes = [shape];
    if (series.every > 1) notes.push(`every ${series.every}th row drawn`);
    if (series.num_dims > series.dims?.length) notes.push(`first ${series.dims.length} of ${series.num_dims} dimensions`);
    const title = el("h3", {}, series.name, el("span", { className: "quiet" }, notes.join(" · ")));
    this.node = el("section", { className: "plot" }, title);
    if (series.problem) {
      this.node.append(el("p", { className: "quiet" }, series.problem));
      return;
    }
    series.dims.forEach((_, dim) => dim < SHOWN_AT_FIRST && this.shown.add(dim));
    this.drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.high = el("span", { className: "high" });
    this.low = el("span", { className: "low" });
    this.dims = this.toggles(title);
    this.node.append(el("div", { className: "axes" }, this.high, this.low, this.drawing), this.dims);
    this.listen(seek);
    this.draw();
  }

  toggles(title) {
    this.buttons = this.series.dims.map((_, dim) => {
      const toggle = el("button", { type: "button", onclick: () => this.toggle(dim) }, el("i"), `${dim}`, el("span"));
      toggle.style.setProperty("--colour", colour(dim));
      return toggle;
    });
    if (this.buttons.length > 1) {
      const all = (isOn) => () => {
        this.buttons.forEach((_, dim) => (isOn ? this.shown.add(dim) : this.shown.delete(dim)));
        this.draw();
      };
      title.append(el("span", { className: "push" },
        el("button", { type: "button", className: "link", onclick: all(true) }, "all"),
        el("button", { type: "button", className: "link", onclick: all(false) }, "none")));
    }
    return el("div", { className: "dims" }, ...this.buttons);
  }

  toggle(dim) {
    if (!this.shown.delete(dim)) this.shown.add(dim);
    this.draw();
  }

  listen(seek) {
    const go = (event) => {
      const box = this.drawing.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      seek(Math.round(share * this.lastFrame));
    };
    this.drawing.addEventListener("pointerdown", (event) => {
      this.drawing.setPointerCapture(event.pointerId);
      go(event);
    });
    this.drawing.addEventListener("pointermove", (event) => event.buttons & 1 && go(event));
  }

  draw() {
    const { dims, frames } = this.series;
    const values = [...this.shown].flatMap((dim) => dims[dim]).filter((value) => value !== null);
    const [low, high] = values.length ? values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]) : [0, 1];
    const span = high - low || 1;
    const x = (frame) => (frame / this.lastFrame) * WIDTH;
    const y = (value) => 5 + (1 - (high === low ? 0.5 : (value - low) / span)) * (HEIGHT - 10);
    const lines = [...this.shown].sort((a, b) => a - b).map((dim) =>
      svg("path", { d: path(frames, dims[dim], x, y), class: "line", stroke: colour(dim) }));
    const zero = low < 0 && high > 0 ? [svg("path", { d: `M0 ${y(0)}H${WIDTH}`, class: "zero" })] : [];
    this.cursor = svg("path", { d: `M0 0V${HEIGHT}`, class: "cursor" });
    this.drawing.replaceChildren(...zero, ...lines, this.cursor);
    this.high.textContent = values.length ? short(high) : "";
    this.low.textContent = values.length && high !== low ? short(low) : "";
    this.buttons.forEach((toggle, dim) => toggle.setAttribute("aria-pressed", String(this.shown.has(dim))));
    this.follow(this.frame);
  }

  follow(frame) {
    this.frame = frame;
    if (!this.cursor) return;
    this.cursor.setAttribute("transform", `translate(${(Math.min(frame, this.lastFrame) / this.lastFrame) * WIDTH} 0)`);
    const point = this.at(frame);
    this.buttons.forEach((toggle, dim) => {
      const value = point === null ? null : this.series.dims[dim][point];
      toggle.lastChild.textContent = value === null ? "–" : short(value);
    });
  }

  // The row that holds at a frame: the last one not after it; none beyond the end by more than its step.
  at(frame) {
    const { frames } = this.series;
    let [low, high] = [0, frames.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (frames[middle] <= frame + 1e-6) low = middle;
      else high = middle - 1;
    }
    const step = frames.length > 1 ? frames[1] - frames[0] : 1;
    return frame - frames[low] >= Math.max(1, step) && low === frames.length - 1 ? null : low;
  }
}

function path(frames, values, x, y) {
  let isDown = false;
  return frames.map((frame, row) => {
    const value = values[row];
    if (value === null) {
      isDown = false;
      return "";
    }
    const command = isDown ? "L" : "M";
    isDown = true;
    return `${command}${x(frame).toFixed(1)} ${y(value).toFixed(1)}`;
  }).join("");
}

function colour(dim) {
  return `hsl(${HUES[dim % HUES.length]} 65% var(${dim % (2 * HUES.length) < HUES.length ? "--line-light" : "--line-lighter"}))`;
}

function short(value) {
  const isTiny = value !== 0 && Math.abs(value) < 1e-3;
  return (isTiny ? value.toExponential(1) : String(Number(value.toPrecision(4)))).replaceAll("-", "−");
}
