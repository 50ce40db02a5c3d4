// Every latent as a point, on a canvas: forty thousand of them redraw at once when a filter changes.

/** Whole decades or round steps between two numbers, with their text. */
function axisTicks(low, high, log) {
  if (log) {
    const found = [];
    for (let e = Math.ceil(low); e <= Math.floor(high + 1e-9); e++) found.push([e, e === 0 ? "1" : `10${superscript(e)}`]);
    return found;
  }
  return [0, 0.25, 0.5, 0.75, 1].map((v) => [v, String(v)]);
}

const superscript = (value) => String(value).replace("-", "⁻").replace(/\d/g, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]);

/** Red, green and blue of an opaque CSS colour. */
function rgbOf(pen, colour) {
  pen.fillStyle = colour;
  return [1, 3, 5].map((at) => parseInt(pen.fillStyle.slice(at, at + 2), 16));
}

/** Squares of so many device pixels around the points, over what the picture has; colour(i): red, green and blue, null for no square. */
function blendSquares({ data, width, height }, px, py, ratio, side, colour, opacity) {
  for (let i = 0; i < px.length; i++) {
    const rgb = colour(i);
    if (rgb === null || Number.isNaN(px[i]) || Number.isNaN(py[i])) continue;
    const left = Math.max(0, Math.round(px[i] * ratio - side / 2));
    const top = Math.max(0, Math.round(py[i] * ratio - side / 2));
    for (let y = top; y < Math.min(height, top + side); y++) {
      for (let x = left; x < Math.min(width, left + side); x++) {
        const at = 4 * (y * width + x);
        const under = data[at + 3] / 255;
        const over = opacity + (1 - opacity) * under; // opacity of both together
        const keep = ((1 - opacity) * under) / over;
        const share = opacity / over;
        data[at] = data[at] * keep + rgb[0] * share;
        data[at + 1] = data[at + 1] * keep + rgb[1] * share;
        data[at + 2] = data[at + 2] * keep + rgb[2] * share;
        data[at + 3] = 255 * over;
      }
    }
  }
}

/**
 * points: {x, y: Float32Array in axis units, NaN where a latent has none}; axes: {x: {low, high, log, label}, y: ...} or none.
 * colours: names of colour variables, kind: of each latent the place among them, the first where it is left out; pick(latent) on a click; select(box) when a rectangle is drawn.
 */
class Scatter {
  constructor({ label, points, axes, colours, kind, describe, pick, select, margin }) {
    Object.assign(this, { points, axes, colours, kind, describe, pick, select });
    this.margin = margin || { left: 44, right: 10, top: 10, bottom: 40 };
    this.canvas = h("canvas", { role: "img", "aria-label": label });
    this.shown = null;
    this.canvas.addEventListener("pointermove", (event) => this.moved(event));
    this.canvas.addEventListener("pointerleave", () => this.hover(null));
    this.canvas.addEventListener("pointerdown", (event) => this.down(event));
    this.canvas.addEventListener("pointerup", (event) => this.up(event));
    this.observer = new ResizeObserver(() => {
      const box = this.canvas.getBoundingClientRect();
      if (box.width !== this.drawn) this.draw();
    });
    this.observer.observe(this.canvas);
  }

  /** shown: Uint8Array, 1 for latents that pass the filters. */
  update(shown) {
    this.shown = shown;
    this.draw();
  }

  draw() {
    const box = this.canvas.getBoundingClientRect();
    if (!box.width || !this.shown) return;
    this.drawn = box.width;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(box.width * ratio);
    this.canvas.height = Math.round(box.height * ratio);
    this.width = box.width - this.margin.left - this.margin.right;
    this.height = box.height - this.margin.top - this.margin.bottom;
    const pen = this.canvas.getContext("2d", { willReadFrequently: true });
    pen.scale(ratio, ratio);
    if (this.axes.x.label) this.drawAxes(pen);
    const total = this.points.x.length;
    const size = total > 10000 ? 2 : total > 2000 ? 3 : 4;
    const [px, py] = [new Float32Array(total), new Float32Array(total)];
    const [left, top] = [this.across(0), this.down_to(0)];
    const [right, down] = [this.across(1) - left, this.down_to(1) - top];
    for (let i = 0; i < total; i++) {
      px[i] = left + right * this.points.x[i];
      py[i] = top + down * this.points.y[i];
    }
    // Pixels are blended here: as many calls of fillRect take half a second where no graphics card helps.
    const picture = pen.getImageData(0, 0, this.canvas.width, this.canvas.height);
    const grey = rgbOf(pen, cssColour("--rule"));
    const rgb = this.colours.map((name) => rgbOf(pen, cssColour(name)));
    const { shown, kind } = this;
    const side = Math.round(size * ratio);
    blendSquares(picture, px, py, ratio, side, (i) => (shown[i] ? null : grey), 0.9);
    blendSquares(picture, px, py, ratio, side, (i) => (shown[i] ? rgb[kind ? kind[i] : 0] : null), total > 4000 ? 0.6 : 0.75);
    pen.putImageData(picture, 0, 0);
    Object.assign(this, { px, py, buckets: null, picture: null });
  }

  across(value) {
    return this.margin.left + ((value - this.axes.x.low) / (this.axes.x.high - this.axes.x.low)) * this.width;
  }

  down_to(value) {
    return this.margin.top + (1 - (value - this.axes.y.low) / (this.axes.y.high - this.axes.y.low)) * this.height;
  }

  /** Latents by squares of 16 pixels, made when the pointer first asks. */
  squares() {
    if (this.buckets) return this.buckets;
    this.buckets = new Map();
    for (let i = 0; i < this.px.length; i++) {
      if (!this.shown[i] || Number.isNaN(this.px[i]) || Number.isNaN(this.py[i])) continue;
      const key = (this.px[i] >> 4) * 4096 + (this.py[i] >> 4);
      if (!this.buckets.has(key)) this.buckets.set(key, []);
      this.buckets.get(key).push(i);
    }
    return this.buckets;
  }

  drawAxes(pen) {
    const { left, top } = this.margin;
    const bottom = top + this.height;
    pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    pen.fillStyle = cssColour("--muted");
    pen.strokeStyle = cssColour("--rule");
    pen.lineWidth = 1;
    for (const [axis, across] of [[this.axes.x, true], [this.axes.y, false]]) {
      for (const [value, text] of axisTicks(axis.low, axis.high, axis.log)) {
        const part = (value - axis.low) / (axis.high - axis.low);
        if (part < -0.001 || part > 1.001) continue;
        const at = across ? left + part * this.width : bottom - part * this.height;
        pen.beginPath();
        if (across) { pen.moveTo(at, top); pen.lineTo(at, bottom + 3); } else { pen.moveTo(left - 3, at); pen.lineTo(left + this.width, at); }
        pen.stroke();
        pen.textAlign = across ? "center" : "right";
        pen.textBaseline = across ? "top" : "middle";
        pen.fillText(text, across ? at : left - 7, across ? bottom + 6 : at);
      }
    }
    pen.textAlign = "right";
    pen.textBaseline = "top";
    pen.fillText(this.axes.x.label, left + this.width, bottom + 22);
    pen.save();
    pen.translate(2, top);
    pen.rotate(-Math.PI / 2);
    pen.fillText(this.axes.y.label, 0, 0);
    pen.restore();
  }

  nearest(event) {
    const box = this.canvas.getBoundingClientRect();
    const [mx, my] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    let closest = 12 * 12;
    if (!this.px) return null;
    const squares = this.squares();
    for (let dx = -1; dx <= 1; dx++) {
      for (let dy = -1; dy <= 1; dy++) {
        for (const i of squares.get(((mx >> 4) + dx) * 4096 + (my >> 4) + dy) || []) {
          const far = (this.px[i] - mx) ** 2 + (this.py[i] - my) ** 2;
          if (far < closest) [best, closest] = [i, far];
        }
      }
    }
    return best;
  }

  hover(latent, event) {
    if (this.tip) this.tip.remove();
    this.tip = null;
    if (latent === null) return;
    this.tip = h("div.tip", { "aria-hidden": "true" }, this.describe(latent));
    document.body.append(this.tip);
    const wide = this.tip.getBoundingClientRect().width;
    this.tip.style.left = `${Math.min(event.clientX + 12, innerWidth - wide - 8)}px`;
    this.tip.style.top = `${event.clientY + 14}px`;
  }

  corner(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  down(event) {
    if (event.pointerType === "touch") return; // a finger scrolls the page
    this.from = this.corner(event);
    this.canvas.setPointerCapture(event.pointerId);
  }

  moved(event) {
    if (!this.from) {
      this.hover(this.nearest(event), event);
      return;
    }
    this.hover(null);
    const [x, y] = this.corner(event);
    const pen = this.canvas.getContext("2d");
    this.picture = this.picture || pen.getImageData(0, 0, this.canvas.width, this.canvas.height);
    pen.putImageData(this.picture, 0, 0);
    pen.strokeStyle = cssColour("--ink");
    pen.setLineDash([4, 3]);
    pen.strokeRect(this.from[0], this.from[1], x - this.from[0], y - this.from[1]);
    pen.setLineDash([]);
  }

  up(event) {
    const [x, y] = this.corner(event);
    const [fx, fy] = this.from || [x, y];
    this.from = null;
    this.hover(null);
    if (Math.abs(x - fx) < 5 && Math.abs(y - fy) < 5) {
      const latent = this.nearest(event);
      if (latent !== null) this.pick(latent);
    } else if (this.select) {
      const right = (v) => this.axes.x.low + ((v - this.margin.left) / this.width) * (this.axes.x.high - this.axes.x.low);
      const up = (v) => this.axes.y.low + (1 - (v - this.margin.top) / this.height) * (this.axes.y.high - this.axes.y.low);
      this.select({ x: [right(Math.min(x, fx)), right(Math.max(x, fx))], y: [up(Math.max(y, fy)), up(Math.min(y, fy))] });
    } else {
      this.draw();
    }
  }

  /** The picture as SVG, of the latents that pass. */
  svg() {
    const wide = this.width + this.margin.left + this.margin.right;
    const high = this.height + this.margin.top + this.margin.bottom;
    const { left, top } = this.margin;
    const ink = { fill: "#60646c", "font-size": 11, "font-family": "sans-serif" };
    const parts = [];
    if (this.axes.x.label) {
      for (const [value, text] of axisTicks(this.axes.x.low, this.axes.x.high, this.axes.x.log)) {
        parts.push(s("text", { ...ink, x: left + ((value - this.axes.x.low) / (this.axes.x.high - this.axes.x.low)) * this.width, y: top + this.height + 16, "text-anchor": "middle" }, text));
      }
      for (const [value, text] of axisTicks(this.axes.y.low, this.axes.y.high, this.axes.y.log)) {
        parts.push(s("text", { ...ink, x: left - 7, y: top + this.height - ((value - this.axes.y.low) / (this.axes.y.high - this.axes.y.low)) * this.height + 4, "text-anchor": "end" }, text));
      }
      parts.push(s("text", { ...ink, x: left + this.width, y: top + this.height + 32, "text-anchor": "end" }, this.axes.x.label));
      parts.push(s("text", { ...ink, x: left, y: top - 1 }, this.axes.y.label));
      parts.push(s("path", { d: `M${left} ${top}V${top + this.height}H${left + this.width}`, fill: "none", stroke: "#b2b6be" }));
    }
    const fills = this.colours.map(cssColour);
    for (let i = 0; i < this.shown.length; i++) {
      if (!this.shown[i] || Number.isNaN(this.points.x[i]) || Number.isNaN(this.points.y[i])) continue;
      parts.push(s("circle", { cx: this.px[i].toFixed(1), cy: this.py[i].toFixed(1), r: 2, fill: fills[this.kind ? this.kind[i] : 0], opacity: 0.7 }, s("title", null, `latent ${i}`)));
    }
    return s("svg", { viewBox: `0 0 ${Math.round(wide)} ${Math.round(high)}` }, parts);
  }
}
