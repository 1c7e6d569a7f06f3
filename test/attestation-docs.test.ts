import { readdirSync, readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { reasonOf, reasons } from '@fleetkey/server/attestation/reasons.ts'
import { reasonsMarkdown } from '@fleetkey/server/attestation/reasons-table.ts'

const docs = readFileSync(new URL('../docs/attestation.md', import.meta.url), 'utf8')

test('docs/attestation.md has the table of reasons as the code has it', () => {
  const [, table = ''] = docs.split('<!-- reasons -->\n')
  expect(table.trim()).toBe(reasonsMarkdown())
})

test('every reason says meaning, attack and remedy', () => {
  for (const [code, { meaning, attack, remedy }] of Object.entries(reasons))
    for (const text of [meaning, attack, remedy]) expect(text.length, code).toBeGreaterThan(5)
})

const list = Array.from({ length: 53 }, (_, at) => at + 1)

test('every case of the list has a reason', () => {
  const answered = new Set(Object.values(reasons).flatMap(({ cases }) => [...cases]))
  expect(list.filter((number) => !answered.has(number))).toEqual([])
  expect([...answered].filter((number) => !list.includes(number))).toEqual([])
})

/** The numbered tests: rows of a table (number, reason, …), and titles of their own. */
const numberedTests = (): readonly { readonly number: number; readonly title: string; readonly reason: string }[] =>
  readdirSync(new URL('.', import.meta.url))
    .filter((name) => name.endsWith('.test.ts'))
    .flatMap((name) => {
      const source = readFileSync(new URL(name, import.meta.url), 'utf8')
      const rows = source.includes('caseTitles(rows)') ? [...source.matchAll(/\[\s*(\d{1,2}),\s*'([a-z0-9.-]+)',/g)] : []
      const titled = [...source.matchAll(/(?:test|on)\(\s*[`'"]case (\d+): ([^'"`]+)/g)]
      return [
        ...rows.map(([, number, reason = '']) => ({ number: Number(number), reason, title: '' })),
        ...titled.map(([, number, title = '']) => ({ number: Number(number), title: `case ${number}: ${title}`, reason: title.split(',')[0] ?? '' })),
      ]
    })

test('every case of the list has its tests, each with a reason that is for this case, no title twice', () => {
  const found = numberedTests()
  expect(list.filter((number) => !found.some((one) => one.number === number))).toEqual([])
  const titles = found.map(({ title }) => title).filter((title) => title !== '')
  expect(titles.filter((title, at) => titles.indexOf(title) !== at)).toEqual([])
  const wrong = found.filter(({ number, reason }) => reason.includes('.') && reasonOf(reason)?.cases.includes(number) !== true)
  expect(wrong.map(({ number, reason }) => `${number} ${reason}`)).toEqual([])
})

test('every attestation-failed of the server has a reason of the table', () => {
  const folders = ['../server/attestation', '../server/flows']
  const sources = folders.flatMap((folder) =>
    readdirSync(new URL(folder, import.meta.url))
      .filter((name) => name.endsWith('.ts') && !name.endsWith('.test.ts'))
      .map((name) => readFileSync(new URL(`${folder}/${name}`, import.meta.url), 'utf8')),
  )
  const codes = sources.flatMap((source) => [...source.matchAll(/attestation-failed'[^\n]*(?:\n[^\n]*)?reason: '([a-z.-]+)'/g)].map(([, code = '']) => code))
  expect(codes.filter((code) => reasonOf(code) === undefined)).toEqual([])
})
