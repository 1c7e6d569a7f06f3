import { createECDH } from 'node:crypto'
import { join } from 'node:path'
import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { maxShares, openSealedShare, parseShare, sealShare, shareText, type Share } from '@fleetkey/protocol/share.ts'
import { exit, makeFolder, number, readStart, required, text, UsageError, writeResult, type Command, type Invocation } from '../command.ts'
import { facts } from '../output.ts'

/** A share with line ends and spaces is shorter. */
const most = 4096

const fromStandardInput = async (): Promise<Buffer> => {
  if (process.stdin.isTTY) process.stderr.write('the share, then Enter and Ctrl-D: ')
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of process.stdin as AsyncIterable<Buffer>) {
    chunks.push(chunk)
    length += chunk.length
    if (length > most) break
  }
  return Buffer.concat(chunks)
}

/** From a file or standard input, never from the command line: that is seen by others, and kept by the shell. */
const shareIn = async (call: Invocation): Promise<Share> => {
  const [path = '-'] = call.args
  if (/^fleetkey-share/i.test(path))
    throw new UsageError('a share does not belong on the command line, where others see it and the shell keeps it: name a file, or give it on standard input')
  const bytes = path === '-' ? await fromStandardInput() : Buffer.from(readStart(path, most))
  try {
    return parseShare(bytes.toString('latin1'))
  } catch (thrown) {
    throw thrown instanceof Problem ? new UsageError(thrown.message) : thrown
  } finally {
    bytes.fill(0)
  }
}

type SealView = ResponseOf<'seal.status'>

const setText = ({ set, shares, threshold, confirmed, only, gathered }: SealView['sets'][number], isSealed: boolean): string =>
  [
    `set ${set}: any ${threshold} of ${shares} shares`,
    ...(confirmed ? [] : ['not confirmed (fleetkey seal confirm, or split again)']),
    ...(only ? ['nothing else'] : []),
    ...(isSealed ? [gathered.length === 0 ? 'none handed in' : `handed in: ${gathered.join(', ')}, ${threshold - gathered.length} more needed`] : []),
  ].join('; ')

const waysText: Readonly<Record<string, string>> = { file: 'key file', passphrase: 'passphrase' }

const spoken = ({ sealed, reason, ways, sets, wrong }: SealView): string =>
  facts({
    state: sealed ? 'sealed' : 'open',
    ...(sealed ? { because: reason } : {}),
    'opened by': [...ways.map((way) => waysText[way] ?? way), ...(sets.length === 0 ? [] : ['shares'])].join(', ') || 'its own back end',
    ...Object.fromEntries(sets.map((one, at) => [`shares${at === 0 ? '' : ` ${at + 1}`}`, setText(one, sealed)])),
    ...(wrong === 0 ? {} : { 'wrong shares': wrong }),
  })

const sealing = { sealing: { type: 'string' } } as const

/** Puts each share where it is wanted, before the set counts. */
const handOut = async (call: Invocation, set: string, shares: readonly Share[]): Promise<void> => {
  const out = text(call, 'out')
  if (out === undefined) {
    call.out.result({ set, shares: shares.map((share) => ({ index: share.index, share: shareText(share) })) }, () => shares.map(shareText).join('\n'))
    await new Promise<void>((resolve, reject) => void process.stdout.write('', (error) => (error ? reject(error) : resolve())))
    return
  }
  makeFolder(out)
  const files = shares.map((share) => {
    const path = join(out, `share-${set}-${share.index}`)
    writeResult(path, `${shareText(share)}\n`, 0o600)
    return path
  })
  call.out.result({ set, files }, () => files.join('\n'))
}

export const sealCommands: readonly Command[] = [
  {
    name: 'seal status',
    usage: '[--sealing FILE]',
    summary: 'whether the keys are open, what opens them, and how many shares were handed in; exit 5 while they are sealed',
    args: [0, 0],
    options: sealing,
    async run(call) {
      const status = await call.sealedClient().call('seal.status')
      call.out.result(status, () => spoken(status))
      return status.sealed ? exit.notReady : exit.ok
    },
  },
  {
    name: 'seal unseal',
    usage: '[FILE] [--reset] [--sealing FILE]',
    summary: 'hand in one share, from a file or standard input; exit 4 while more are needed. --reset forgets those handed in before',
    args: [0, 1],
    options: { ...sealing, reset: { type: 'boolean', default: false } },
    async run(call) {
      const share = await shareIn(call)
      const client = call.sealedClient()
      try {
        const { recipient } = await client.call('seal.status')
        const sealed = sealShare(new Uint8Array(Buffer.from(recipient, 'base64')), 'in', share)
        const status = await client.call('seal.unseal', { body: { share: Buffer.from(sealed).toString('base64'), reset: call.options['reset'] === true } })
        const set = status.sets.find((one) => one.set === share.set)
        call.out.result(status, () =>
          status.sealed && set !== undefined
            ? `share ${share.index} taken: ${set.gathered.length} of ${set.threshold} (${set.gathered.join(', ')})`
            : `share ${share.index} taken: the keys are open`,
        )
        return status.sealed ? exit.partial : exit.ok
      } finally {
        share.value.destroy()
      }
    },
  },
  {
    name: 'seal split',
    usage: '--shares N --threshold K --reason TEXT [--only] [--out DIR]',
    summary:
      'make N shares, any K of which open the keys, once another operator has approved; earlier shares open nothing then. Printed this once, or one file each. --only: nothing else opens them any more',
    args: [0, 0],
    options: {
      shares: { type: 'string' },
      threshold: { type: 'string' },
      reason: { type: 'string' },
      only: { type: 'boolean', default: false },
      out: { type: 'string' },
    },
    async run(call) {
      const shares = required(number(call, 'shares', 2, maxShares), '--shares N')
      const threshold = required(number(call, 'threshold', 2, shares), '--threshold K')
      const key = createECDH('prime256v1')
      const recipient = key.generateKeys().toString('base64')
      const body = { shares, threshold, only: call.options['only'] === true, reason: required(text(call, 'reason'), '--reason TEXT'), recipient }
      const split = await call.client().call('seal.split', { body })
      if (split.set === null) {
        call.out.result(
          split,
          () => `nothing was done: another operator has to approve it (fleetkey approval grant ${split.approval}), then repeat this command`,
        )
        return exit.refused
      }
      const made = split.shares.map((sealed) => openSealedShare(key, 'out', new Uint8Array(Buffer.from(sealed, 'base64'))))
      try {
        await handOut(call, split.set, made)
      } finally {
        for (const { value } of made) value.destroy()
      }
      // Only now that they are out: had they been lost on the way, what opened the keys before would still do.
      await call.client().call('seal.confirm', { params: { id: split.set } })
      call.out.warn(
        `set ${split.set}: any ${threshold} of these ${shares} shares open the keys. Give each to its keeper and keep no copy: they are not shown again.`,
      )
      return exit.ok
    },
  },
  {
    name: 'seal confirm',
    usage: 'SET',
    summary: 'the shares of a set are in good hands, where split could not say so itself: sets before it open nothing any more',
    args: [1, 1],
    async run(call) {
      const [set = ''] = call.args
      if (!/^[0-9a-f]{16}$/.test(set)) throw new UsageError(`'${set}' is no set of shares: 16 hexadecimal digits, as seal status shows them`)
      const status = await call.client().call('seal.confirm', { params: { id: set } })
      call.out.result(status, () => spoken(status))
      return exit.ok
    },
  },
]
