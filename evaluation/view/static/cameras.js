// Where a camera's pictures come from: JPEGs decoded a little ahead, or a video element. Both show frames by number.

import { el } from "./dom.js";

const BITMAP_BYTES = 160e6;
const MAX_AHEAD = 48;

export class Pictures {
  constructor(camera, address, share) {
    Object.assign(this, { camera, address, waiting: new Map(), ready: new Map(), shown: -1 });
    this.node = el("canvas", { width: camera.width, height: camera.height });
    this.capacity = Math.max(12, Math.floor(BITMAP_BYTES / share / (4 * camera.width * camera.height)));
    this.abort = new AbortController();
  }

  get last() {
    return this.camera.num_frames - 1;
  }

  has(frame) {
    return this.ready.has(Math.min(frame, this.last));
  }

  // The frame on the canvas as soon as it is there; the ones after it are fetched meanwhile.
  async show(frame, { loop = true } = {}) {
    frame = Math.min(frame, this.last);
    this.wanted = frame;
    const now = this.fetch(frame);
    for (let ahead = 1; ahead <= Math.min(MAX_AHEAD, this.capacity >> 1, this.last); ahead++) {
      if (frame + ahead <= this.last || loop) this.fetch((frame + ahead) % (this.last + 1));
    }
    this.forget();
    const bitmap = this.ready.get(frame) ?? (await now);
    if (this.wanted !== frame || this.shown === frame || this.abort.signal.aborted) return;
    this.node.getContext("2d").drawImage(bitmap, 0, 0, this.node.width, this.node.height);
    this.shown = frame;
  }

  fetch(frame) {
    if (!this.waiting.has(frame)) {
      this.waiting.set(frame, this.decode(frame));
      this.waiting.get(frame).catch(() => {});  // told by the `show` that needs the frame
    }
    return this.waiting.get(frame);
  }

  async decode(frame) {
    const response = await fetch(this.address(frame), { signal: this.abort.signal });
    if (!response.ok) throw new Error((await response.text()).trim());
    const bitmap = await createImageBitmap(await response.blob());
    if (this.waiting.has(frame)) this.ready.set(frame, bitmap);
    return bitmap;
  }

  // Drop the frames that come last on the way from here, round the end.
  forget() {
    if (this.waiting.size <= this.capacity) return;
    const away = (frame) => (frame - this.wanted + this.last + 1) % (this.last + 1);
    const order = [...this.waiting.keys()].sort((a, b) => away(b) - away(a));
    for (const frame of order.slice(0, this.waiting.size - this.capacity)) {
      this.waiting.delete(frame);
      this.ready.delete(frame);
    }
  }

  close() {
    this.abort.abort();
    this.ready.clear();
  }
}

export class Video {
  constructor(camera, address, fps) {
    Object.assign(this, { camera, fps });
    this.node = el("video", { muted: true, playsInline: true, preload: "auto", disablePictureInPicture: true });
    this.node.src = address;
    this.loaded = new Promise((resolve, reject) => {
      this.node.addEventListener("loadeddata", resolve, { once: true });
      this.node.addEventListener("error", () => reject(new Error("This browser cannot play the stored H.264 video.")), { once: true });
    });
    this.loaded.catch(() => {});
  }

  get frame() {
    return Math.min(this.camera.num_frames - 1, Math.floor(this.node.currentTime * this.fps + 1e-4));
  }

  // The middle of a frame's time: no rounding error reaches its neighbours.
  async show(frame) {
    await this.loaded;
    const time = (Math.min(frame, this.camera.num_frames - 1) + 0.5) / this.fps;
    if (Math.abs(this.node.currentTime - time) > 1e-6) this.node.currentTime = time;
  }

  close() {
    this.node.removeAttribute("src");
    this.node.load();
  }
}
