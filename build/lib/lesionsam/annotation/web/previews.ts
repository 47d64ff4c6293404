// Masks that follow the boxes: one question at a time, the newest boxes of each lesion, the rest forgotten.

import * as api from "./api";
import type { Box, Preview } from "./types";

interface Wanted {
  key: string;
  big: Box;
  small: Box | null;
  others: Box[];
}

const AGAIN = 250; // ms until the model is asked again for an image that it has not encoded yet

export class Previews {
  results = new Map<string, Preview>();
  private wanted = new Map<string, Wanted>();
  private isBusy = false;

  constructor(private arrived: (id: string, preview: Preview, isNewest: boolean) => void) {}

  clear(): void {
    this.results = new Map();
    this.wanted.clear();
  }

  forget(id: string): void {
    this.results.delete(id);
    this.wanted.delete(id);
  }

  ask(id: string, key: string, big: Box, small: Box | null, others: Box[]): void {
    this.wanted.delete(id);
    this.wanted.set(id, { key, big: [...big], small: small && [...small], others });
    void this.pump();
  }

  private async pump(): Promise<void> {
    if (this.isBusy) return;
    const next = [...this.wanted.entries()].pop();
    if (!next) return;
    const [id, want] = next;
    this.wanted.delete(id);
    this.isBusy = true;
    const results = this.results;
    try {
      const preview = await api.preview(want.key, id, want.big, want.small, want.others);
      if (results === this.results) {
        const isNewest = !this.wanted.has(id);
        results.set(id, preview);
        this.arrived(id, preview, isNewest);
        if (preview.pending && isNewest) {
          window.setTimeout(() => {
            if (results === this.results && !this.wanted.has(id)) this.ask(id, want.key, want.big, want.small, want.others);
          }, AGAIN);
        }
      }
    } catch (error) {
      if (!(error instanceof api.Problem)) throw error; // without a preview one can still draw
    } finally {
      this.isBusy = false;
    }
    void this.pump();
  }
}
