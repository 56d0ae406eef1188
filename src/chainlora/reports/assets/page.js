"use strict";
// Hover: the number nearest to the pointer, of those that the figure's table holds too.
(() => {
  const tip = document.getElementById("tip");
  const reach = 28; // pixels

  const distance = (point, x, y, box) => {
    const top = point[1] * box.height;
    const bottom = point.length > 3 ? point[3] * box.height : top;
    const beside = Math.abs(point[0] * box.width - x);
    const above = Math.max(top - y, y - bottom, 0);
    // a dot that is as near as a line that runs through it comes first
    return Math.hypot(beside, above) + (point.length > 3 ? 4 : 0);
  };

  for (const drawing of document.querySelectorAll(".drawing")) {
    const points = JSON.parse(drawing.dataset.points);
    const dot = document.createElement("div");
    dot.className = "dot";
    dot.hidden = true;
    drawing.append(dot);

    const leave = () => {
      tip.hidden = true;
      dot.hidden = true;
    };
    const show = (event) => {
      const box = drawing.getBoundingClientRect();
      const x = event.clientX - box.left, y = event.clientY - box.top;
      let best = null, least = reach;
      for (const point of points) {
        const found = distance(point, x, y, box);
        if (found < least) [best, least] = [point, found];
      }
      if (best === null) return leave();
      const isLine = best.length > 3;
      dot.hidden = isLine;
      dot.style.left = `${best[0] * 100}%`;
      dot.style.top = `${best[1] * 100}%`;
      tip.textContent = best[2];
      tip.hidden = false;
      const left = box.left + best[0] * box.width;
      const top = box.top + (isLine ? y : best[1] * box.height);
      const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = `${scrollX + Math.max(8, Math.min(left + 12, room))}px`;
      const above = top - tip.offsetHeight - 12;
      tip.style.top = `${scrollY + (above > 4 ? above : top + 16)}px`;
    };
    drawing.addEventListener("pointermove", show);
    drawing.addEventListener("pointerdown", show);
    drawing.addEventListener("pointerleave", leave);
  }
})();
