// Pictures: fetched ahead, a few kept in memory; contrast and gamma for looking only.

import * as api from "./api";

const KEPT = 9;

export class Pictures {
  private held = new Map<string, Promise<ImageBitmap>>();

  /** The picture of an image; fetched once. */
  get(key: string, level = "view"): Promise<ImageBitmap> {
    const name = `${level}/${key}`;
    let found = this.held.get(name);
    if (found) this.held.delete(name);
    else {
      found = api.picture(key, level);
      found.catch(() => this.held.delete(name));
    }
    this.held.set(name, found);
    while (this.held.size > KEPT) {
      const [oldest, promise] = this.held.entries().next().value as [string, Promise<ImageBitmap>];
      this.held.delete(oldest);
      promise.then((bitmap) => window.setTimeout(() => bitmap.close(), 5000)).catch(() => undefined);
    }
    return found;
  }

  forget(key: string): void {
    for (const level of ["view", "full"]) this.held.delete(`${level}/${key}`);
  }
}

export interface Look {
  contrast: number;
  gamma: number;
}

/** Byte -> byte: contrast about the middle grey, then gamma above 1 lifts the dark. */
export function curve(look: Look): Uint8ClampedArray {
  const table = new Uint8ClampedArray(256);
  for (let k = 0; k < 256; k++) {
    const value = Math.min(1, Math.max(0, (k / 255 - 0.5) * look.contrast + 0.5));
    table[k] = Math.round(255 * Math.pow(value, 1 / look.gamma));
  }
  return table;
}

/** The picture as it is to be seen; the picture itself where nothing is changed. */
export function adjusted(bitmap: ImageBitmap, look: Look): CanvasImageSource {
  if (look.contrast === 1 && look.gamma === 1) return bitmap;
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true }) as CanvasRenderingContext2D;
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  const table = curve(look);
  for (let k = 0; k < pixels.data.length; k += 4) {
    pixels.data[k] = table[pixels.data[k]];
    pixels.data[k + 1] = table[pixels.data[k + 1]];
    pixels.data[k + 2] = table[pixels.data[k + 2]];
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}
