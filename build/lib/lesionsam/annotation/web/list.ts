// The images as a list: only the rows in sight exist, so that fifty thousand cost no more than fifty.

import type { Row } from "./types";

export type Filter = "all" | "todo" | "review" | "done";
export const FILTERS: [Filter, string][] = [["all", "All"], ["todo", "To do"], ["review", "Review"], ["done", "Done"]];

const HEIGHT = 60;
const SPARE = 4;
const WORDS: Record<Row["status"], string> = {
  open: "to do", done: "", unseen: "accepted unseen", no_lesion: "no lesion", cannot_tell: "cannot tell", rejected: "proposal rejected, to draw",
  faulty: "cannot be opened",
};
const SIGNS: Record<Row["status"], string> = {
  open: "", done: "\u2713", unseen: "\u25cc", no_lesion: "\u2205", cannot_tell: "?", rejected: "\u2715", faulty: "!",
};

export class List {
  rows: Row[] = [];
  filter: Filter = "all";
  doubts = new Map<string, number>();
  private all: Row[] = [];
  private search = "";
  private pool = new Map<number, HTMLElement>();
  private drawn = 0;
  private current = "";

  constructor(private scroller: HTMLElement, private spacer: HTMLElement, private empty: HTMLElement,
              private picked: (key: string) => void) {
    scroller.addEventListener("scroll", () => this.later(), { passive: true });
    new ResizeObserver(() => this.later()).observe(scroller);
  }

  setRows(all: Row[]): void {
    this.all = all;
    this.refresh();
  }

  setFilter(filter: Filter): void {
    this.filter = filter;
    this.refresh();
    this.scroller.scrollTop = 0;
  }

  setSearch(search: string): void {
    this.search = search.toLowerCase();
    this.refresh();
    this.scroller.scrollTop = 0;
  }

  setCurrent(key: string): void {
    this.current = key;
    const place = this.rows.findIndex((row) => row.key === key);
    if (place >= 0) {
      const [top, view] = [place * HEIGHT, this.scroller.clientHeight];
      if (top < this.scroller.scrollTop || top + HEIGHT > this.scroller.scrollTop + view) {
        this.scroller.scrollTop = top - view / 2 + HEIGHT / 2;
      }
    }
    this.redraw();
  }

  /** Which rows there are, and in which order. */
  refresh(): void {
    const wanted = (row: Row): boolean =>
      this.filter === "all" ? true
        : this.filter === "todo" ? isToDo(row)
          : this.filter === "done" ? !isToDo(row) && row.status !== "faulty"
            : row.status === "unseen" || (this.doubts.has(row.key) && row.status === "open");
    this.rows = this.all.filter((row) => wanted(row) && (!this.search || row.id.toLowerCase().includes(this.search)));
    if (this.filter === "review") {
      const places = new Map([...this.doubts.keys()].map((key, place) => [key, place])); // the server's order
      const place = (row: Row): number => (row.status === "unseen" ? undefined : places.get(row.key)) ?? places.size;
      this.rows.sort((a, b) => place(a) - place(b));
    }
    this.spacer.style.height = `${this.rows.length * HEIGHT}px`;
    this.empty.hidden = this.rows.length > 0;
    for (const element of this.pool.values()) element.remove();
    this.pool.clear();
    this.redraw();
  }

  update(row: Row): void {
    for (const [place, element] of this.pool) {
      if (this.rows[place] === row) this.fill(element, row);
    }
  }

  private later(): void {
    window.cancelAnimationFrame(this.drawn);
    this.drawn = window.requestAnimationFrame(() => this.redraw());
  }

  private redraw(): void {
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / HEIGHT) - SPARE);
    const last = Math.min(this.rows.length, Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / HEIGHT) + SPARE);
    for (const [place, element] of this.pool) {
      if (place < first || place >= last) {
        element.remove();
        this.pool.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      let element = this.pool.get(place);
      if (!element) {
        element = this.make(place);
        this.pool.set(place, element);
        this.spacer.append(element);
      }
      element.classList.toggle("current", this.rows[place].key === this.current);
    }
  }

  private make(place: number): HTMLElement {
    const row = this.rows[place];
    const element = document.createElement("button");
    element.type = "button";
    element.className = "row";
    element.tabIndex = -1;
    element.style.transform = `translateY(${place * HEIGHT}px)`;
    const picture = document.createElement("img");
    picture.alt = "";
    picture.loading = "lazy";
    picture.decoding = "async";
    picture.addEventListener("error", () => {
      picture.removeAttribute("src"); // the browser's own sign of a broken picture says nothing
      picture.classList.add("broken");
    });
    const [text, name, note, sign] = ["span", "span", "span", "span"].map((kind) => document.createElement(kind));
    text.className = "text";
    name.className = "name";
    note.className = "note";
    sign.className = "sign";
    text.append(name, note);
    element.append(picture, text, sign);
    element.addEventListener("click", () => this.picked(row.key));
    if (row.status !== "faulty") {
      window.setTimeout(() => {
        if (element.isConnected) picture.src = `/api/images/${row.key}/picture?level=thumb`;
      }, 120);
    } else picture.classList.add("broken");
    this.fill(element, row);
    return element;
  }

  private fill(element: HTMLElement, row: Row): void {
    const lesions = row.count ? `${row.count} lesion${row.count > 1 ? "s" : ""}` : "";
    const doubt = this.filter === "review" && row.status === "open" ? `doubt ${(this.doubts.get(row.key) ?? 0).toFixed(2)}` : "";
    element.dataset.status = row.status;
    element.title = row.id;
    (element.querySelector(".name") as HTMLElement).textContent = row.id;
    (element.querySelector(".note") as HTMLElement).textContent = doubt || (row.status === "unseen" ? "" : lesions) || WORDS[row.status];
    (element.querySelector(".sign") as HTMLElement).textContent = SIGNS[row.status];
  }
}

export function isToDo(row: Row): boolean {
  return row.status === "open" || row.status === "rejected";
}
