import fc from 'fast-check'
import { expect, test } from 'vitest'
import { byBytes, SortedTexts } from './sorted-texts.ts'

test('holds what a set holds, in byte order, through any insertions and removals', () => {
  const text = fc.oneof(fc.stringMatching(/^[a-c]{0,3}$/), fc.string({ unit: 'grapheme', maxLength: 3 }))
  fc.assert(
    fc.property(fc.array(text), fc.array(fc.tuple(fc.boolean(), text)), text, (first, changes, bound) => {
      const [sorted, set] = [new SortedTexts([...new Set(first)]), new Set(first)]
      for (const [isAdded, one] of changes) {
        if (isAdded) sorted.add(one)
        else sorted.remove(one)
        if (isAdded) set.add(one)
        else set.delete(one)
      }
      const expected = [...set].toSorted((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)))
      expect([...sorted.from('')]).toEqual(expected)
      expect([...sorted.from(bound)]).toEqual(expected.filter((one) => byBytes(one, bound) >= 0))
    }),
  )
})

test('20,000 texts in random order: chunks are split and emptied', () => {
  const texts = Array.from({ length: 20_000 }, (_, at) => String((at * 7919) % 20_000).padStart(5, '0'))
  const sorted = new SortedTexts([])
  for (const text of texts) sorted.add(text)
  expect([...sorted.from('')]).toEqual(texts.toSorted())
  for (const text of texts) if (text > '00002') sorted.remove(text)
  expect([...sorted.from('')]).toEqual(['00000', '00001', '00002'])
})
