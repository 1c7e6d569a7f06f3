import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { ascii, concat, TpmFormatError } from './bytes.ts'
import { alg } from './constants.ts'
import { imaLimits, marshalIma, parseIma, type ImaEntry } from './ima.ts'
import { bootAggregate, measuredFiles, replayIma } from './ima-replay.ts'
import { digest } from './kdf.ts'
import { le32 } from './little-endian.ts'

const runs = process.env['FLEETKEY_LONG'] === '1' ? 20_000 : 300
const hex = (bytes: Uint8Array | undefined): string => Buffer.from(bytes ?? []).toString('hex')
const reasonOf = (run: () => unknown): string | undefined => {
  try {
    run()
    return 'accepted'
  } catch (error) {
    if (error instanceof TpmFormatError) return error.reason
    throw error
  }
}

const names = new Map<number, string>([
  [alg.sha1, 'sha1'],
  [alg.sha256, 'sha256'],
  [alg.sha384, 'sha384'],
  [alg.sha512, 'sha512'],
])
const field = (bytes: Uint8Array): Uint8Array => concat(le32(bytes.length), bytes)
const dataOf = (of: { hash: number; digest: Uint8Array; path: string; signature?: Uint8Array }): Uint8Array =>
  concat(
    field(concat(ascii(`${names.get(of.hash)}:\0`), of.digest)),
    field(ascii(`${of.path}\0`)),
    of.signature === undefined ? new Uint8Array(0) : field(of.signature),
  )
interface Made {
  readonly hash?: number
  readonly content?: string
  readonly digest?: Uint8Array
  readonly path: string
  readonly signature?: Uint8Array
  readonly violation?: boolean
}
/** Template ima-sig where there is a signature, be it empty. */
const entry = (of: Made): ImaEntry => {
  const hash = of.hash ?? alg.sha256
  const own = of.violation === true ? new Uint8Array(digest(hash).length) : (of.digest ?? digest(hash, ascii(of.content ?? of.path)))
  const templateData = dataOf({ hash, digest: own, path: of.path, ...(of.signature === undefined ? {} : { signature: of.signature }) })
  return {
    template: of.signature === undefined ? 'ima-ng' : 'ima-sig',
    templateHash: of.violation === true ? new Uint8Array(20) : digest(alg.sha1, templateData),
    templateData,
    violation: of.violation === true,
    hash,
    digest: own,
    path: of.path,
    signature: of.signature === undefined || of.signature.length === 0 ? null : of.signature,
  }
}
/** The line that the kernel writes of it (ima_ascii_measurements_show). */
const line = ({ template, templateHash, hash, digest: own, path, signature }: ImaEntry): string =>
  `10 ${hex(templateHash)} ${template} ${names.get(hash)}:${hex(own)} ${path}${template === 'ima-sig' ? ` ${hex(signature ?? undefined)}` : ''}\n`

const firmware = new Map(Array.from({ length: 10 }, (_, pcr) => [pcr, digest(alg.sha256, ascii(`pcr ${pcr}`))] as const))
const boot = new Map<number, ReadonlyMap<number, Uint8Array>>([[alg.sha256, firmware]])
const aggregate = entry({ path: 'boot_aggregate', digest: bootAggregate(boot, alg.sha256) ?? new Uint8Array(0) })
const list = [
  aggregate,
  entry({ path: '/init' }),
  entry({ path: '/bin/agent', signature: Uint8Array.of(3, 2, 4) }),
  entry({ path: '/etc/x', signature: new Uint8Array(0) }),
]
const pcr10 = (entries: readonly ImaEntry[], hash: number = alg.sha256): Uint8Array =>
  entries.reduce<Uint8Array>(
    (before, { violation, templateData }) => digest(hash, before, violation ? new Uint8Array(before.length).fill(0xff) : digest(hash, templateData)),
    new Uint8Array(digest(hash).length),
  )
const quoted = (entries: readonly ImaEntry[], hash: number = alg.sha256) => ({ quoted: pcr10(entries, hash), hash, boot })
const parse = (bytes: Uint8Array) => parseIma(bytes, imaLimits.wire)

/** One binary record. */
const record = (of: { pcr?: number; name?: string; nameLength?: number; data?: Uint8Array; size?: number; hash?: Uint8Array }): Uint8Array => {
  const data = of.data ?? list[1]?.templateData ?? new Uint8Array(0)
  const name = ascii(of.name ?? 'ima-ng')
  const hash = of.hash ?? digest(alg.sha1, data)
  return concat(le32(of.pcr ?? 10), hash, le32(of.nameLength ?? name.length), name, le32(of.size ?? data.length), data)
}
const ng = (digestField: Uint8Array, pathField: Uint8Array): Uint8Array => record({ data: concat(field(digestField), field(pathField)) })
const sha256Field = concat(ascii('sha256:\0'), new Uint8Array(32).fill(7))

describe('refused by name', () => {
  const whole = marshalIma(list)
  test.each<[string, Uint8Array, string]>([
    ['cut inside an entry', whole.subarray(0, -1), 'ima.truncated'],
    ['an entry of PCR 11', record({ pcr: 11 }), 'ima.pcr'],
    ['template ima', record({ name: 'ima' }), 'ima.template'],
    ['template ima-buf', record({ name: 'ima-buf' }), 'ima.template'],
    ['template ima-modsig', record({ name: 'ima-modsig' }), 'ima.template'],
    ['a template name of four gigabytes', record({ nameLength: 0xffff_ffff }), 'ima.template'],
    ['an entry of four gigabytes', record({ size: 0xffff_ffff }), 'ima.limit.entry'],
    ['a field of four gigabytes', record({ data: concat(le32(0xffff_ffff), new Uint8Array(40)) }), 'ima.malformed'],
    ['no field', record({ data: new Uint8Array(0) }), 'ima.malformed'],
    ['a field too many', record({ data: concat(list[1]?.templateData ?? new Uint8Array(0), field(new Uint8Array(0))) }), 'ima.malformed'],
    ['ima-sig without its third field', record({ name: 'ima-sig' }), 'ima.malformed'],
    ['a digest without its algorithm', ng(new Uint8Array(32).fill(7), ascii('/x\0')), 'ima.malformed'],
    ['a digest of an unknown algorithm', ng(concat(ascii('md5:\0'), new Uint8Array(16)), ascii('/x\0')), 'ima.malformed'],
    ['a digest named after a property of objects', ng(concat(ascii('constructor:\0'), new Uint8Array(32)), ascii('/x\0')), 'ima.malformed'],
    ['a digest of another size', ng(sha256Field.subarray(0, -1), ascii('/x\0')), 'ima.malformed'],
    ['a path without its NUL', ng(sha256Field, ascii('/x')), 'ima.malformed'],
    ['a path with a NUL inside', ng(sha256Field, ascii('/x\0/y\0')), 'ima.malformed'],
    ['no path', ng(sha256Field, new Uint8Array(0)), 'ima.malformed'],
    ['a violation with a digest', record({ data: concat(field(sha256Field), field(ascii('/x\0'))), hash: new Uint8Array(20) }), 'ima.malformed'],
    ['a line without its end', ascii(line(aggregate).trimEnd()), 'ima.truncated'],
    ['a line of PCR 11', ascii(line(aggregate).replace('10', '11')), 'ima.pcr'],
    ['a line of template ima-buf', ascii(line(aggregate).replace('ima-ng', 'ima-buf')), 'ima.template'],
    ['a line with an odd digest', ascii(line(aggregate).replace('sha256:', 'sha256:0')), 'ima.malformed'],
    ['a line with other letters', ascii(line(aggregate).toUpperCase()), 'ima.malformed'],
    ['a signature that is no number', ascii(line(list[2] ?? aggregate).replace('030204', '03020g')), 'ima.malformed'],
    ['an empty line', ascii('\n\n'), 'ima.truncated'],
    ['a path that pretends to be a second line', ascii(line(entry({ path: '/x\n11 /y' }))), 'ima.malformed'],
  ])('%s', (_, bytes, reason) => expect(reasonOf(() => parse(bytes))).toBe(reason))

  test('too many entries, too many bytes', () => {
    for (const bytes of [whole, ascii(list.map(line).join(''))]) {
      expect(reasonOf(() => parseIma(bytes, { maxEntries: list.length, maxBytes: bytes.length }))).toBe('accepted')
      expect(reasonOf(() => parseIma(bytes, { maxEntries: list.length - 1, maxBytes: bytes.length }))).toBe('ima.limit.entries')
      expect(reasonOf(() => parseIma(bytes, { maxEntries: list.length, maxBytes: bytes.length - 1 }))).toBe('ima.limit.bytes')
    }
  })

  test('every cut is refused, or a shorter list', () => {
    const between = new Set(list.map((_, count) => marshalIma(list.slice(0, count)).length))
    const cuts = Array.from(whole.subarray(1), (_, at) => reasonOf(() => parse(whole.subarray(0, at + 1))))
    expect(cuts).toEqual(cuts.map((_, at) => (between.has(at + 1) ? 'accepted' : 'ima.truncated')))
  })
})

describe('replay', () => {
  test.each([
    ['sha1', alg.sha1],
    ['sha256', alg.sha256],
    ['sha384', alg.sha384],
    ['sha512', alg.sha512],
  ])('of bank %s', (_, hash) => expect(replayIma(list, quoted(list, hash)).length).toBe(list.length))

  test('ends where the quote was', () => {
    for (let length = 1; length <= list.length; length++) expect(replayIma(list, quoted(list.slice(0, length))).length).toBe(length)
  })

  const agent = entry({ path: '/bin/agent', signature: Uint8Array.of(3, 2, 4) })
  const forged = { ...agent, templateData: entry({ path: '/bin/agent', content: 'another', signature: Uint8Array.of(3, 2, 4) }).templateData }
  test.each<[string, readonly ImaEntry[], readonly ImaEntry[], string]>([
    ['case 48: template hash of other data', list.with(2, forged), list, 'ima.template-hash'],
    ['case 48: another file under a right hash', list.with(2, entry({ path: '/bin/agent', content: 'another' })), list, 'ima.no-prefix'],
    ['case 48: an entry dropped', list.toSpliced(1, 1), list, 'ima.no-prefix'],
    ['case 48: two entries exchanged', [aggregate, agent, entry({ path: '/init' })], list.slice(0, 3), 'ima.no-prefix'],
    ['the end dropped', list.slice(0, -1), list, 'ima.no-prefix'],
    ['case 48: no boot_aggregate', list.slice(1), list.slice(1), 'ima.boot-aggregate'],
    ['case 48: boot_aggregate of another boot', [entry({ path: 'boot_aggregate' }), ...list.slice(1)], [], 'ima.boot-aggregate'],
    ['boot_aggregate of a bank that nobody quoted', [entry({ path: 'boot_aggregate', hash: alg.sha1 }), ...list.slice(1)], [], 'ima.boot-aggregate'],
    ['an empty list', [], [], 'ima.boot-aggregate'],
    ['nothing was measured', list, [], 'ima.no-prefix'],
    ['case 48: a violation', [...list, entry({ path: '/x', violation: true })], [...list, entry({ path: '/x', violation: true })], 'ima.violation'],
  ])('%s', (_, given, real, reason) => expect(reasonOf(() => replayIma(given, quoted(real)))).toBe(reason))

  test('boot_aggregate of SHA-1 is over PCRs 0 to 7, of others over 0 to 9', () => {
    const values = (count: number) => Array.from({ length: count }, (_, pcr) => firmware.get(pcr) ?? new Uint8Array(0))
    expect(hex(bootAggregate(boot, alg.sha256))).toBe(hex(digest(alg.sha256, ...values(10))))
    const weak = new Map([[alg.sha1, new Map(values(10).map((value, pcr) => [pcr, value.subarray(0, 20)]))]])
    expect(hex(bootAggregate(weak, alg.sha1))).toBe(hex(digest(alg.sha1, ...values(8).map((value) => value.subarray(0, 20)))))
    expect(bootAggregate(boot, alg.sha1)).toBeUndefined()
  })

  test('goes on after what is known', () => {
    const after = pcr10(list.slice(0, 2))
    expect(replayIma(list.slice(2), { ...quoted(list), after })).toMatchObject({ length: 2, fromBoot: false })
    expect(replayIma([], { ...quoted(list), after: pcr10(list) }).length).toBe(0)
    expect(reasonOf(() => replayIma(list, { ...quoted(list), after }))).toBe('ima.no-prefix')
  })
})

describe('measured files', () => {
  test('are those that were quoted, with their signatures', () => {
    const files = measuredFiles(list, replayIma(list, quoted(list.slice(0, 3))))
    expect(files.map(({ path, signature }) => [path, hex(signature ?? undefined)])).toEqual([
      ['/init', ''],
      ['/bin/agent', '030204'],
    ])
  })

  test('a file cannot pass for boot_aggregate', () => {
    const posing = entry({ path: 'boot_aggregate', content: 'malware' })
    const measured = replayIma([posing], { ...quoted([...list, posing]), after: pcr10(list) })
    expect(measuredFiles([posing], measured)).toHaveLength(1)
    expect(measuredFiles([...list, posing], replayIma([...list, posing], quoted([...list, posing])))).toHaveLength(list.length)
  })

  test('a path that is no UTF-8 is told apart', () => {
    const data = concat(field(sha256Field), field(Uint8Array.of(0x2f, 0xff, 0x61, 0)))
    expect(parse(record({ data }))[0]?.path).toBe(String.raw`/\xffa`)
  })

  test('a violation of an older kernel has twenty zeros', () => {
    const data = concat(field(concat(ascii('sha256:\0'), new Uint8Array(20))), field(ascii('/x\0')))
    expect(parse(record({ data, hash: new Uint8Array(20) }))[0]).toMatchObject({ violation: true, path: '/x' })
  })
})

describe('any list', () => {
  const lists = fc.array(
    fc
      .record({
        hash: fc.constantFrom(...names.keys()),
        path: fc.stringMatching(/^\/[ -~]{0,30}$/),
        signature: fc.option(fc.uint8Array({ maxLength: 20 }), { nil: undefined }),
        violation: fc.boolean(),
      })
      .map(({ signature, ...of }) => entry({ ...of, ...(signature === undefined ? {} : { signature }) })),
    { maxLength: 8 },
  )

  test('parse and marshal are inverse, binary and ASCII agree', () =>
    fc.assert(
      fc.property(lists, (entries) => {
        const bytes = marshalIma(entries)
        expect(parse(bytes)).toEqual(entries)
        expect(hex(marshalIma(parse(bytes)))).toBe(hex(bytes))
        expect(parse(ascii(entries.map(line).join('')))).toEqual(entries)
      }),
      { numRuns: runs },
    ))
})

test('a full list on the wire is judged', () => {
  const many = [aggregate, ...Array.from({ length: 20_000 }, (_, at) => entry({ path: `/usr/bin/${at}` }))]
  const bytes = marshalIma(many)
  expect(bytes.length).toBeLessThan(imaLimits.wire.maxBytes)
  expect(replayIma(parse(bytes), quoted(many)).length).toBe(many.length)
})
