// Boxes and what dragging does to them. The core stays inside the big box, the big box inside the image.

import type { Box } from "./types";

export type Handle = "nw" | "n" | "ne" | "e" | "se" | "s" | "sw" | "w" | "move";
export interface Point {
  x: number;
  y: number;
}

export const LEAST = 2; // side of a box, pixels of the image

export function clamp(value: number, low: number, high: number): number {
  return Math.min(Math.max(value, low), Math.max(low, high));
}

/** The box between two corners, inside `limits`. */
export function boxBetween(a: Point, b: Point, limits: Box): Box {
  const [x0, y0, x1, y1] = limits;
  const xs = [clamp(a.x, x0, x1), clamp(b.x, x0, x1)];
  const ys = [clamp(a.y, y0, y1), clamp(b.y, y0, y1)];
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

/** A box at least `LEAST` wide and high, grown about its middle and kept inside `limits`. */
export function atLeast(box: Box, limits: Box): Box {
  const out: Box = [...box];
  for (const k of [0, 1]) {
    const least = Math.min(LEAST, limits[k + 2] - limits[k]);
    if (out[k + 2] - out[k] < least) {
      const low = clamp((out[k] + out[k + 2] - least) / 2, limits[k], limits[k + 2] - least);
      out[k] = low;
      out[k + 2] = low + least;
    }
  }
  return out;
}

export function moved(box: Box, dx: number, dy: number, limits: Box): Box {
  const ax = clamp(dx, limits[0] - box[0], limits[2] - box[2]);
  const ay = clamp(dy, limits[1] - box[1], limits[3] - box[3]);
  return [box[0] + ax, box[1] + ay, box[2] + ax, box[3] + ay];
}

/** A box whose handle was dragged by (dx, dy); edges do not pass each other. */
export function resized(box: Box, handle: Handle, dx: number, dy: number, limits: Box): Box {
  if (handle === "move") return moved(box, dx, dy, limits);
  const out: Box = [...box];
  if (handle.includes("w")) out[0] = clamp(box[0] + dx, limits[0], box[2] - LEAST);
  if (handle.includes("e")) out[2] = clamp(box[2] + dx, box[0] + LEAST, limits[2]);
  if (handle.includes("n")) out[1] = clamp(box[1] + dy, limits[1], box[3] - LEAST);
  if (handle.includes("s")) out[3] = clamp(box[3] + dy, box[1] + LEAST, limits[3]);
  return out;
}

/** The core moved, and shrunk where it must be, so that it lies inside the big box. */
export function keptInside(core: Box, big: Box): Box {
  const out: Box = [...core];
  for (const k of [0, 1]) {
    const side = Math.min(core[k + 2] - core[k], big[k + 2] - big[k]);
    out[k] = clamp(core[k], big[k], big[k + 2] - side);
    out[k + 2] = out[k] + side;
  }
  return out;
}

/** A core to begin with: the middle of the big box, until the colours are known. */
export function middle(big: Box, share = 0.4): Box {
  const [x, y] = [(big[0] + big[2]) / 2, (big[1] + big[3]) / 2];
  const [u, v] = [((big[2] - big[0]) * share) / 2, ((big[3] - big[1]) * share) / 2];
  return [x - u, y - v, x + u, y + v];
}

export function rounded(box: Box): Box {
  return box.map((value) => Math.round(value * 100) / 100) as Box;
}

export function same(a: Box, b: Box): boolean {
  return a.every((value, k) => Math.abs(value - b[k]) < 0.005);
}

export function holds(box: Box, p: Point, margin = 0): boolean {
  return p.x >= box[0] - margin && p.x <= box[2] + margin && p.y >= box[1] - margin && p.y <= box[3] + margin;
}

/** Which handle of a box a point is on, `reach` pixels around its edges; inside is "move", outside null. */
export function handleAt(box: Box, p: Point, reach: number): Handle | null {
  if (!holds(box, p, reach)) return null;
  const inner = Math.min(reach, (box[2] - box[0]) / 4, (box[3] - box[1]) / 4);
  const n = p.y < box[1] + inner;
  const s = p.y > box[3] - inner;
  const w = p.x < box[0] + inner;
  const e = p.x > box[2] - inner;
  const name = (n ? "n" : s ? "s" : "") + (w ? "w" : e ? "e" : "");
  return (name || "move") as Handle;
}

/** How the picture lies on the screen: screen = image * scale + offset, in CSS pixels of the canvas. */
export class View {
  scale = 1;
  x = 0;
  y = 0;

  toScreen(p: Point): Point {
    return { x: p.x * this.scale + this.x, y: p.y * this.scale + this.y };
  }

  toImage(p: Point): Point {
    return { x: (p.x - this.x) / this.scale, y: (p.y - this.y) / this.scale };
  }

  /** The whole image in a canvas, with a margin. */
  fit(width: number, height: number, canvasWidth: number, canvasHeight: number): void {
    const margin = Math.min(28, canvasWidth / 16, canvasHeight / 16);
    this.scale = Math.min((canvasWidth - 2 * margin) / width, (canvasHeight - 2 * margin) / height);
    this.x = (canvasWidth - width * this.scale) / 2;
    this.y = (canvasHeight - height * this.scale) / 2;
  }

  /** Zoom about a point of the screen. */
  zoom(factor: number, at: Point, least: number): void {
    const scale = clamp(this.scale * factor, least, 40);
    const p = this.toImage(at);
    this.scale = scale;
    this.x = at.x - p.x * scale;
    this.y = at.y - p.y * scale;
  }

  /** Keep some of the image in sight. */
  keep(width: number, height: number, canvasWidth: number, canvasHeight: number): void {
    const seen = 60;
    this.x = clamp(this.x, seen - width * this.scale, canvasWidth - seen);
    this.y = clamp(this.y, seen - height * this.scale, canvasHeight - seen);
  }
}
