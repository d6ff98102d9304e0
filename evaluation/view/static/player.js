// All cameras of a clip in step: one frame number that everything on the page follows.

import { button, el, icon } from "./dom.js";
import { Pictures, Video } from "./cameras.js";

const SPEEDS = [0.1, 0.25, 0.5, 1, 2, 4];
const MAX_DRIFT_S = 0.08;
const settings = { speed: 1, loop: true };  // stay as they are from clip to clip

export class Player {
  // `onFrame(frame)` is called for every frame shown; `move(step)` goes to another clip.
  constructor(sample, version, { onFrame, move }) {
    Object.assign(this, { sample, onFrame, frame: 0, isPlaying: false, last: Math.max(0, sample.num_frames - 1) });
    this.fps = sample.fps || 1;
    const key = encodeURIComponent(sample.key);
    this.isVideo = sample.layout === "video";
    this.cameras = sample.cameras.map((camera) => {
      const name = encodeURIComponent(camera.name);
      return this.isVideo
        ? new Video(camera, `/video/${key}/${name}.mp4?v=${version}`, this.fps)
        : new Pictures(camera, (frame) => `/frame/${key}/${name}/${frame}.jpg?v=${version}`, sample.cameras.length);
    });
    this.node = el("div", { className: "player" }, this.stage(), this.controls(move));
    this.seek(0);
  }

  stage() {
    this.notice = el("p", { className: "notice", hidden: true });
    const figures = this.cameras.map(({ camera, node }) => {
      node.addEventListener("click", () => this.toggle());
      const figure = el("figure", {}, node, el("figcaption", {}, el("b", {}, camera.name), ` ${camera.width} × ${camera.height}`));
      figure.style.setProperty("--ratio", camera.width / camera.height);
      return figure;
    });
    return el("div", { className: "stage" }, ...figures, this.notice);
  }

  controls(move) {
    this.playButton = button("play", "Play or pause (space)", () => this.toggle());
    this.playButton.classList.add("main");
    this.slider = el("input", { type: "range", min: 0, max: this.last, step: 1, ariaLabel: "Frame" });
    this.slider.addEventListener("input", () => this.seek(Number(this.slider.value)));
    this.counter = el("output", { className: "counter" });
    const speed = el("select", { title: "Speed", ariaLabel: "Speed" }, ...SPEEDS.map((x) => el("option", { value: x }, `${x}×`)));
    speed.value = settings.speed;
    speed.addEventListener("change", () => this.setSpeed(Number(speed.value)));
    const loop = el("input", { type: "checkbox", checked: settings.loop });
    loop.addEventListener("change", () => (settings.loop = loop.checked));
    return el("div", { className: "controls" },
      button("previous", "Previous clip (k)", () => move(-1)), button("stepBack", "One frame back (←)", () => this.step(-1)),
      this.playButton, button("stepOn", "One frame on (→)", () => this.step(1)), button("next", "Next clip (j)", () => move(1)),
      this.slider, this.counter, speed, el("label", { className: "check" }, loop, "loop"));
  }

  toggle() {
    if (this.isPlaying) this.pause();
    else this.play();
  }

  step(by) {
    this.pause();
    this.seek(Math.min(this.last, Math.max(0, this.frame + by)));
  }

  seek(frame) {
    this.tell(frame);
    this.start = { frame, time: performance.now() };
    for (const camera of this.cameras) camera.show(frame, settings).catch((error) => this.fail(error));
  }

  async play() {
    if (this.isPlaying || this.last === 0) return;
    if (this.frame === this.last) this.seek(0);
    this.isPlaying = true;
    this.playButton.replaceChildren(icon("pause"));
    this.setSpeed(settings.speed);
    if (this.isVideo) {
      await Promise.all(this.cameras.map((camera) => camera.loaded)).catch((error) => this.fail(error));
      if (!this.isPlaying) return;
      for (const { node } of this.cameras) node.play().catch(() => {});
    }
    requestAnimationFrame((now) => this.tick(now));
  }

  pause() {
    if (!this.isPlaying) return;
    this.isPlaying = false;
    this.playButton.replaceChildren(icon("play"));
    if (this.isVideo) {
      for (const { node } of this.cameras) node.pause();
      this.seek(this.frame);
    }
  }

  tick(now) {
    if (!this.isPlaying) return;
    if (this.isVideo) this.tickVideo();
    else this.tickPictures(now);
    requestAnimationFrame((next) => this.tick(next));
  }

  // The first camera leads; another one is only moved when it is visibly off, for a seek interrupts its playing.
  tickVideo() {
    const [leader, ...others] = this.cameras;
    if (leader.node.ended || leader.frame > this.last) return this.end();
    for (const { node } of others) {
      if (Math.abs(node.currentTime - leader.node.currentTime) > MAX_DRIFT_S && !node.seeking && !node.ended) {
        node.currentTime = leader.node.currentTime;
      }
    }
    if (leader.frame !== this.frame) this.tell(leader.frame);
    return undefined;
  }

  // Frames are due by the clock, but one that has not come holds up all cameras: they stay in step.
  tickPictures(now) {
    const due = this.start.frame + Math.floor(((now - this.start.time) / 1000) * this.fps * settings.speed);
    let frame = this.frame;
    while (frame < Math.min(due, this.last) && this.cameras.every((camera) => camera.has(frame + 1))) frame++;
    if (frame < Math.min(due, this.last)) this.start = { frame, time: now };
    if (frame !== this.frame) {
      this.tell(frame);
      for (const camera of this.cameras) camera.show(frame, settings).catch((error) => this.fail(error));
    }
    if (due > this.last && frame === this.last) this.end();
  }

  end() {
    if (!settings.loop) return this.pause();
    this.seek(0);
    if (this.isVideo) for (const { node } of this.cameras) node.play().catch(() => {});
    return undefined;
  }

  setSpeed(speed) {
    settings.speed = speed;
    this.start = { frame: this.frame, time: performance.now() };
    if (this.isVideo) for (const { node } of this.cameras) node.playbackRate = speed;
  }

  tell(frame) {
    this.frame = frame;
    this.slider.value = frame;
    this.counter.value = `${frame} / ${this.last} · ${(frame / this.fps).toFixed(2)} s`;
    this.onFrame(frame);
  }

  fail(error) {
    if (error.name === "AbortError" || this.isClosed) return;
    this.pause();
    this.notice.textContent = error.message;
    this.notice.hidden = false;
  }

  close() {
    this.isClosed = true;
    this.isPlaying = false;
    for (const camera of this.cameras) camera.close();
  }
}
