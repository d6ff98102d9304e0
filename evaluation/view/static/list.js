// A list of any length: only the rows in sight exist, pages come from the server when they are scrolled to.

import { el, get } from "./dom.js";

const ROW_PX = 64;
const PAGE = 100;

export class List {
  constructor(box) {
    Object.assign(this, { box, total: 0, selected: -1, pages: new Map(), space: el("div", { className: "space" }) });
    box.replaceChildren(this.space);
    box.addEventListener("scroll", () => this.render(), { passive: true });
    new ResizeObserver(() => this.render()).observe(box);
  }

  // Show `source` as `query` filters it; `draw(row)` gives a row's children, `pick(row)` is called for the chosen one.
  // `keep` stays where it is, for a list that has grown; `around` is the key to select if it is in the list.
  async load({ source, query, draw, pick, around = "", keep = false }) {
    const request = (this.request = {});
    const first = keep ? Math.floor(this.box.scrollTop / ROW_PX / PAGE) : 0;
    const answer = await get(source, { ...query, around, offset: first * PAGE, limit: PAGE });
    if (request !== this.request) return;  // another filter was chosen meanwhile
    Object.assign(this, { source, query, draw, pick, total: answer.total, pages: new Map([[first, answer.rows]]) });
    this.space.style.height = `${this.total * ROW_PX}px`;
    if (!keep) this.box.scrollTop = 0;
    this.select(answer.position ?? -1, !keep);
  }

  async page(number) {
    const { pages } = this;
    if (!pages.has(number)) {
      const rows = get(this.source, { ...this.query, offset: number * PAGE, limit: PAGE }).then((answer) => answer.rows);
      pages.set(number, rows);
      rows.then((found) => pages.set(number, found), () => pages.delete(number)).then(() => this.render());
    }
    return pages.get(number);
  }

  select(position, scroll = true) {
    this.selected = position;
    const top = position * ROW_PX;
    const { scrollTop, clientHeight } = this.box;
    const isInSight = top >= scrollTop && top + ROW_PX <= scrollTop + clientHeight;
    if (scroll && position >= 0 && !isInSight) this.box.scrollTop = top - (clientHeight - ROW_PX) / 2;
    this.render();
  }

  // The row `step` further, or the first one when none is selected.
  async move(step) {
    const position = this.selected < 0 ? 0 : this.selected + step;
    if (position < 0 || position >= this.total) return;
    const rows = await this.page(Math.floor(position / PAGE));
    this.select(position);
    this.pick(rows[position % PAGE]);
  }

  render() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_PX) - 4);
    const end = Math.min(this.total, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW_PX) + 4);
    const positions = Array.from({ length: Math.max(0, end - first) }, (_, index) => first + index);
    this.space.replaceChildren(...positions.map((position) => this.item(position)));
  }

  item(position) {
    const page = this.pages.get(Math.floor(position / PAGE));
    if (!page) this.page(Math.floor(position / PAGE));
    const row = Array.isArray(page) ? page[position % PAGE] : null;
    const node = el("div", { className: "item", role: "option", ariaSelected: String(position === this.selected) });
    node.style.top = `${position * ROW_PX}px`;
    if (!row) return node;
    node.append(...this.draw(row));
    node.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.select(position, false);
      this.pick(row);
    });
    return node;
  }
}
