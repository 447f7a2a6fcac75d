/* SPDX-License-Identifier: Apache-2.0 */
/* The replay engine's algorithm as C, for benchmarks/replay.py: what the engine is measured against and compared with.
 *
 * The same trees (generations, pairs of present and ever bits, two passes over 64 operations) and the same counts, for
 * the operations that the benchmark's streams have and the two policies that it runs: TOUCH, ENTER, UNLOAD, ROLE,
 * SWITCH, INVALIDATE, ZAP, COLLAPSE; no root log, no axes but own_reference. Nothing in a stream is checked.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef uint64_t u64;
typedef uint32_t u32;

enum { TOUCH, FIX, ENTER, UNLOAD, ROLE, SWITCH, INVALIDATE, ZAP, ZAP_ALL, SPLIT, COLLAPSE };
enum { BLOCK = 64 };
static const u64 NONE = ~0ull;

typedef struct { u64 present, ever; } pair;
typedef struct { pair at[8]; } table;
typedef struct { u32 at[512]; } node;

typedef struct {
    u64 gen; /* of the current root, NONE without one or with a pending request */
    u32 top, deep, word, pad;
    i64 faults, refaults, hits;
    u64 pad2[2];
} vcpu;

typedef struct root {
    struct root *before, *after;
    i64 word, refs, valid;
} root;

typedef struct {
    root *slot[4];
    i64 word, request, loads, creations, reuses;
} slots;

typedef struct {
    u64 gen;
    i64 leaves, tables;
    root *root;
    u32 top, level, as_id;
} word;

typedef struct {
    table *table;
    u64 *gen;
    node *node;
    u32 *page_of;
    u32 tables, nodes, table_room, node_room;
    vcpu *vcpu;
    slots *slots;
    word *word;
    root head;
    i64 vcpus, words, own_reference;
    u64 last_gen;
    i64 frees, made, freed, zapped, flushes;
    i64 gone_leaves, gone_tables;
} vm;

static void *zeroed(size_t size)
{
    void *at = NULL;
    size = (size + 63) / 64 * 64;
    if (posix_memalign(&at, 64, size)) abort();
    return memset(at, 0, size);
}

static void *grown(void *old, size_t size)
{
    void *at = zeroed(2 * size);
    memcpy(at, old, size);
    free(old);
    return at;
}

static void make_room(vm *m)
{
    if (m->tables + 8 > m->table_room) {
        m->table = grown(m->table, m->table_room * sizeof(table));
        m->gen = grown(m->gen, m->table_room * sizeof(u64));
        m->table_room *= 2;
    }
    if (m->nodes + 8 > m->node_room) {
        m->node = grown(m->node, m->node_room * sizeof(node));
        m->page_of = grown(m->page_of, m->node_room * sizeof(u32));
        m->node_room *= 2;
    }
}

static inline unsigned entry(i64 gfn, int level) { return gfn >> (level - 1) * 9 & 511; }

static inline u32 below(const vm *m, const word *w, u32 n, int level, unsigned at)
{
    u32 c = m->node[n].at[at];
    return m->gen[level == 2 ? c : m->page_of[c]] == w->gen ? c : 0;
}

static int leaf(const vm *m, const word *w, i64 gfn)
{
    u32 c = w->top;
    for (int level = w->level; c; level--) {
        unsigned at = entry(gfn, level);
        u32 page = level == 1 ? c : m->page_of[c];
        if (m->table[page].at[at >> 6].present >> (at & 63) & 1) return level;
        if (level == 1) return 0;
        c = below(m, w, c, level, at);
    }
    return 0;
}

static void drop(vm *m, const word *w, u32 c, int level)
{
    u32 page = level == 1 ? c : m->page_of[c];
    m->gone_tables++;
    for (int i = 0; i < 8; i++) m->gone_leaves += __builtin_popcountll(m->table[page].at[i].present);
    if (level > 1)
        for (int i = 0; i < 512; i++) {
            u32 b = below(m, w, c, level, i);
            if (b) drop(m, w, b, level - 1);
        }
    m->gen[page] = 0;
}

static void take(vm *m, word *w)
{
    w->leaves -= m->gone_leaves;
    w->tables -= m->gone_tables;
    m->zapped += m->gone_leaves;
    m->freed += m->gone_tables;
}

static i64 clear(vm *m, u32 page, i64 first, i64 last)
{
    i64 leaves = 0;
    for (i64 i = first >> 6; first <= last && i <= last >> 6; i++) {
        u64 mask = ~0ull;
        if (i == first >> 6) mask &= ~0ull << (first & 63);
        if (i == last >> 6) mask &= ~0ull >> (63 - (last & 63));
        leaves += __builtin_popcountll(m->table[page].at[i].present & mask);
        m->table[page].at[i].present &= ~mask;
    }
    return leaves;
}

static u32 make(vm *m, word *w, u32 n, int level, unsigned at)
{
    u32 c = m->node[n].at[at], page;
    if (c == 0) {
        page = c = m->tables++;
        if (level > 2) {
            c = m->nodes++;
            m->page_of[c] = page;
        }
        m->node[n].at[at] = c;
    } else {
        page = level == 2 ? c : m->page_of[c];
        for (int i = 0; i < 8; i++) m->table[page].at[i].present = 0;
    }
    m->gen[page] = w->gen;
    w->tables++;
    return c;
}

static void fault(vm *m, vcpu *v, i64 gfn, int goal)
{
    word *w = &m->word[v->word];
    u32 c = w->top;
    make_room(m);
    for (int level = w->level; level > goal; level--) {
        unsigned at = entry(gfn, level);
        u32 b = below(m, w, c, level, at);
        if (b == 0) {
            if (clear(m, m->page_of[c], at, at)) {
                w->leaves--;
                m->zapped++;
            }
            b = make(m, w, c, level, at);
            m->made++;
        }
        c = b;
    }
    unsigned at = entry(gfn, goal);
    v->faults++;
    if (goal > 1) {
        u32 b = below(m, w, c, goal, at);
        if (b) {
            m->gone_leaves = m->gone_tables = 0;
            drop(m, w, b, goal - 1);
            take(m, w);
        }
    }
    pair *p = &m->table[goal == 1 ? c : m->page_of[c]].at[at >> 6];
    u64 bit = 1ull << (at & 63);
    v->refaults += (p->ever & bit) != 0;
    w->leaves += !(p->present & bit);
    p->present |= bit;
    p->ever |= bit;
}

static void raze(vm *m, word *w)
{
    m->zapped += w->leaves;
    m->freed += w->tables;
    if (w->tables) w->gen = ++m->last_gen;
    w->leaves = w->tables = 0;
}

static void free_root(vm *m, root *r)
{
    if (r->valid) {
        raze(m, &m->word[r->word]);
        m->word[r->word].root = NULL;
    }
    r->before->after = r->after;
    r->after->before = r->before;
    free(r);
    m->frees++;
}

static void put(vm *m, root *r)
{
    if (--r->refs == 0) free_root(m, r);
}

static void refresh(vm *m, i64 n)
{
    root *r = m->slots[n].slot[0];
    vcpu *v = &m->vcpu[n];
    v->gen = NONE;
    if (!r) return;
    word *w = &m->word[r->word];
    v->word = r->word;
    v->top = w->top;
    v->deep = w->level == 5;
    if (!m->slots[n].request) v->gen = w->gen;
}

static void empty(vm *m, slots *s, int only_invalid)
{
    for (int i = 1; i < 5; i++) {
        root *r = s->slot[i & 3];
        if (r && !(only_invalid && r->valid)) {
            s->slot[i & 3] = NULL;
            put(m, r);
        }
    }
}

static void load(vm *m, slots *s)
{
    word *w = &m->word[s->word];
    s->loads++;
    m->flushes++;
    if (w->root) {
        w->root->refs++;
        s->reuses++;
    } else {
        root *r = zeroed(sizeof *r);
        r->word = s->word;
        r->refs = 1 + m->own_reference;
        r->valid = 1;
        r->before = m->head.before;
        r->after = &m->head;
        r->before->after = r->after->before = r;
        w->root = r;
        s->creations++;
    }
    s->slot[0] = w->root;
}

static void enter(vm *m, i64 n)
{
    slots *s = &m->slots[n];
    if (m->vcpu[n].gen == NONE) {
        if (s->request) {
            s->request = 0;
            empty(m, s, 1);
        }
        if (!s->slot[0]) load(m, s);
    }
    refresh(m, n);
}

static void unload(vm *m, i64 n)
{
    m->slots[n].request = 0;
    empty(m, &m->slots[n], 0);
    refresh(m, n);
}

static void search(vm *m, slots *s)
{
    root *good = m->word[s->word].root, *r = s->slot[0];
    if (!r) {
        for (int i = 1; i < 4; i++)
            if (good && s->slot[i] == good) {
                s->slot[0] = good;
                for (; i < 3; i++) s->slot[i] = s->slot[i + 1]; /* close the gap that the root leaves */
                s->slot[3] = NULL;
                return;
            }
        return;
    }
    if (r == good) return;
    for (int i = 1; i < 4; i++) {
        r = s->slot[i];
        s->slot[i] = s->slot[0];
        s->slot[0] = r;
        if (r && r == good) return;
    }
    s->slot[0] = NULL;
    if (r) put(m, r);
}

static void invalidate(vm *m)
{
    int flush = 0;
    for (root *r = m->head.after, *after; r != &m->head; r = after) {
        after = r->after;
        if (!r->valid) continue;
        flush = 1;
        raze(m, &m->word[r->word]);
        m->word[r->word].root = NULL;
        r->valid = 0;
        r->refs -= m->own_reference;
        if (r->refs == 0) free_root(m, r);
    }
    for (i64 n = 0; n < m->vcpus; n++) {
        m->slots[n].request = 1;
        m->vcpu[n].gen = NONE;
    }
    m->flushes += flush;
}

static void zap_range(vm *m, const word *w, u32 n, int level, i64 base, i64 start, i64 end)
{
    int shift = (level - 1) * 9;
    i64 first = (start - base) >> shift, last = (end - 1 - base) >> shift;
    if (first < 0) first = 0;
    if (last > 511) last = 511;
    m->gone_leaves += clear(m, m->page_of[n], first, last);
    for (i64 at = first; at <= last; at++) {
        u32 b = below(m, w, n, level, at);
        i64 low = base + (at << shift);
        if (b && level > 2) zap_range(m, w, b, level - 1, low, start, end);
        else if (b)
            m->gone_leaves += clear(m, b, start > low ? start - low : 0, end - 1 - low < 511 ? end - 1 - low : 511);
    }
}

static void zap(vm *m, i64 as_id, i64 start, i64 end)
{
    i64 removed = 0;
    for (word *w = m->word; w < m->word + m->words; w++)
        if (w->as_id == as_id && w->root) {
            m->gone_leaves = m->gone_tables = 0;
            zap_range(m, w, w->top, w->level, 0, start, end);
            take(m, w);
            removed += m->gone_leaves;
        }
    m->flushes += removed > 0;
}

static void collapse(vm *m, i64 as_id, int goal, i64 gfn)
{
    i64 removed = 0;
    for (word *w = m->word; w < m->word + m->words; w++) {
        if (w->as_id != as_id || !w->root) continue;
        u32 c = w->top;
        for (int level = w->level; c && level >= goal; level--) c = below(m, w, c, level, entry(gfn, level));
        if (!c) continue;
        m->gone_leaves = m->gone_tables = 0;
        drop(m, w, c, goal - 1);
        take(m, w);
        removed++;
    }
    m->flushes += removed > 0;
}

static void slow(vm *m, u32 op, i64 gfn, const i64 *ranges)
{
    i64 n = op >> 16;
    int level = op >> 4 & 7;
    switch (op & 15) {
    case TOUCH:
        enter(m, n);
        if (leaf(m, &m->word[m->vcpu[n].word], gfn) >= level) m->vcpu[n].hits++;
        else fault(m, &m->vcpu[n], gfn, level);
        break;
    case ENTER: enter(m, n); break;
    case UNLOAD: unload(m, n); break;
    case ROLE: m->slots[n].word = gfn; break;
    case SWITCH:
        m->slots[n].word = gfn;
        search(m, &m->slots[n]);
        refresh(m, n);
        break;
    case INVALIDATE: invalidate(m); break;
    case ZAP: zap(m, level, ranges[2 * gfn], ranges[2 * gfn + 1]); break;
    case COLLAPSE: collapse(m, n, level, gfn); break;
    default: abort();
    }
}

void run(vm *m, const u32 *op, const i64 *gfn, i64 n, const i64 *ranges)
{
    u32 guess[BLOCK];
    vcpu *vcpus = m->vcpu;
    for (i64 i = 0; i < n; i += BLOCK) {
        int end = n - i < BLOCK ? n - i : BLOCK;
        const node *nodes = m->node;
        for (int j = 0; j < end; j++) {
            u32 o = op[i + j];
            i64 g = gfn[i + j];
            vcpu *v = &vcpus[o >> 16];
            if ((o & 15) == TOUCH) {
                u32 c = v->top;
                if (v->deep) c = nodes[c].at[entry(g, 5)];
                c = nodes[c].at[entry(g, 4)];
                u32 low = nodes[c].at[entry(g, 3)];
                u32 page = nodes[low].at[entry(g, 2)];
                int level = o >> 4 & 7;
                if (level != 1) page = m->page_of[level == 2 ? low : c];
                guess[j] = page;
            } else if ((o & 14) == ROLE) { /* and SWITCH */
                v->top = m->word[g].top;
                v->deep = m->word[g].level == 5;
            }
        }
        for (int j = 0; j < end; j++) {
            u32 o = op[i + j];
            i64 g = gfn[i + j];
            if ((o & 15) == TOUCH) {
                vcpu *v = &vcpus[o >> 16];
                if (m->gen[guess[j]] == v->gen) {
                    int level = o >> 4 & 7;
                    unsigned at = entry(g, level);
                    pair *p = &m->table[guess[j]].at[at >> 6];
                    u64 bit = 1ull << (at & 63);
                    u64 missing = ~p->present >> (at & 63) & 1;
                    if (!(missing && level > 1)) {
                        v->faults += missing;
                        v->refaults += p->ever >> (at & 63) & missing;
                        v->hits += missing ^ 1;
                        m->word[v->word].leaves += missing;
                        p->present |= bit;
                        p->ever |= bit;
                        continue;
                    }
                }
            }
            slow(m, o, g, ranges);
        }
    }
}

vm *begin(i64 words, const i64 *levels, const i64 *as_ids, i64 vcpus, i64 own_reference)
{
    vm *m = zeroed(sizeof *m);
    m->words = words;
    m->vcpus = vcpus;
    m->own_reference = own_reference;
    m->table_room = m->node_room = 256;
    m->table = zeroed(m->table_room * sizeof(table));
    m->gen = zeroed(m->table_room * sizeof(u64));
    m->node = zeroed(m->node_room * sizeof(node));
    m->page_of = zeroed(m->node_room * sizeof(u32));
    m->vcpu = zeroed(vcpus * sizeof(vcpu));
    m->slots = zeroed(vcpus * sizeof(slots));
    m->word = zeroed(words * sizeof(word));
    m->head.before = m->head.after = &m->head;
    m->tables = m->nodes = words + 1;
    m->last_gen = words;
    for (i64 n = 0; n < vcpus; n++) m->vcpu[n].gen = NONE;
    for (i64 i = 0; i < words; i++) {
        m->word[i].gen = m->word[i].top = m->page_of[i + 1] = i + 1;
        m->word[i].level = levels[i];
        m->word[i].as_id = as_ids[i];
    }
    return m;
}

/* By vCPU: loads, creations, reuses, faults, refaults, hits; then of the VM: frees, tables, freed, zapped, flushes. */
void counts(const vm *m, i64 *out)
{
    for (i64 n = 0; n < m->vcpus; n++) {
        const slots *s = &m->slots[n];
        const vcpu *v = &m->vcpu[n];
        i64 of_vcpu[] = {s->loads, s->creations, s->reuses, v->faults, v->refaults, v->hits};
        memcpy(out, of_vcpu, sizeof of_vcpu);
        out += 6;
    }
    i64 of_vm[] = {m->frees, m->made, m->freed, m->zapped, m->flushes};
    memcpy(out, of_vm, sizeof of_vm);
}

void end(vm *m)
{
    for (root *r = m->head.after, *after; r != &m->head; r = after) {
        after = r->after;
        free(r);
    }
    free(m->table);
    free(m->gen);
    free(m->node);
    free(m->page_of);
    free(m->vcpu);
    free(m->slots);
    free(m->word);
    free(m);
}
