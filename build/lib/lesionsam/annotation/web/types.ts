// What the server and the page say to each other. Boxes are XYXY in pixels of the upright image, origin upper left.

export type Box = [number, number, number, number];
export type Source = "drawn" | "corrected" | "accepted" | "automatic";
export type Mark = "" | "no_lesion" | "cannot_tell" | "rejected";
export type Status = "open" | "done" | "unseen" | "faulty" | Exclude<Mark, "">;
export type Part = "big" | "small";

export interface Lesion {
  id: string;
  big: Box;
  small: Box;
  core: "drawn" | "suggested";
  source: Source;
  seconds: number;
  proposed: [Box, Box] | null;
  agreed?: boolean;
}

export interface State {
  revision: number;
  mark: Mark;
  status: Status;
  by: string;
  at: string;
  change: string;
  seconds: number;
  lesions: Lesion[];
}

export interface ProposedLesion {
  big: Box;
  small: Box;
}

export interface Proposal {
  lesions: ProposedLesion[];
  doubt: number;
  why: string[];
}

export interface Detail {
  width: number;
  height: number;
  state: State;
  problem: string;
  proposal: Proposal | null;
}

export interface Row {
  key: string;
  id: string;
  status: Status;
  count: number;
  revision: number;
}

export interface Session {
  who: string;
  title: string;
  table: string;
  store: string;
  clock: number;
  model: { name: string; threshold: number } | null;
  images: [string, string, Status, number, number][];
  problem: string;
}

export interface Changes {
  clock: number;
  changed: [string, Status, number, number][];
  problem: string;
  proposed: number;
}

export interface Outline {
  rings: number[][];
  iou?: number;
  entropy?: number;
}

export interface Preview {
  small: Box;
  prior: Outline;
  model: Outline | null;
  pending: boolean;
  agreement?: number;
}

/** What one image is to become: all its lesions, or a mark. */
export interface Snapshot {
  lesions: Lesion[];
  mark: Mark;
  inSight?: boolean; // what a model proposes was drawn on the screen since the image was opened
}
