import { inside, tags, whole, type Element } from '../der.ts'
import { refuseRequest } from './reasons.ts'
import { isRoca } from './roca.ts'
import { understood } from './structure.ts'

const rounds = 100
const numberOf = (bytes: Uint8Array): bigint => BigInt(`0x${Buffer.from(bytes).toString('hex') || '0'}`)
const bitsOf = (value: bigint): number => value.toString(2).length

/** Newton's method from above; exact floor. */
const squareRoot = (value: bigint): bigint => {
  let guess = 1n << BigInt((bitsOf(value) + 1) >> 1)
  for (;;) {
    const next = (guess + value / guess) >> 1n
    if (next >= guess) return guess
    guess = next
  }
}

/** Residues of a square modulo 64: most numbers are ruled out before a root is taken. */
const squares = new Set(Array.from({ length: 64 }, (_, n) => (n * n) % 64))
const isSquare = (value: bigint): boolean => squares.has(Number(value & 63n)) && squareRoot(value) ** 2n === value

/** Fermat's method: factors found within so many rounds mean primes that differ in their lower half only. */
const hasClosePrimes = (modulus: bigint): boolean => {
  let a = squareRoot(modulus)
  if (a * a < modulus) a++
  for (let round = 0; round < rounds; round++, a++) if (isSquare(a * a - modulus)) return true
  return false
}

const smallPrimes = Array.from({ length: 752 }, (_, n) => n).filter((n) => {
  for (let divisor = 2; divisor * divisor <= n; divisor++) if (n % divisor === 0) return false
  return n > 2
})
/** Their product: one division of the modulus instead of 131. */
const primorial = smallPrimes.reduce((product, prime) => product * BigInt(prime), 1n)

const positive = (element: Element): bigint =>
  (element.content[0] ?? 0x80) >= 0x80 || element.content.every((byte) => byte === 0) ? refuseRequest('csr.rsa.modulus') : numberOf(element.content)

/** RSA is admitted nowhere; this says what is wrong with a key first, since whoever asks may well use it elsewhere. Always throws. */
export const refuseRsa = (publicKey: Uint8Array): never => {
  const [n, e] = understood(() => {
    const reader = inside(whole(publicKey, tags.sequence))
    const [modulus, exponent] = [reader.next(tags.integer), reader.next(tags.integer)]
    reader.end()
    return [modulus, exponent] as const
  }, 'csr.key.encoding')
  const modulus = positive(n)
  const bits = bitsOf(modulus)
  // Before anything that costs time.
  if (bits > 4096) refuseRequest('csr.rsa.long', `RSA-${bits}`)
  if ((modulus & 1n) === 0n) refuseRequest('csr.rsa.even')
  if (e.content.length > 5) refuseRequest('csr.rsa.exponent', `an exponent of ${e.content.length} bytes`)
  const exponent = positive(e)
  if (exponent < 65_537n || (exponent & 1n) === 0n || exponent > 1n << 32n) refuseRequest('csr.rsa.exponent', `exponent ${exponent}`)
  const rest = modulus % primorial
  if (smallPrimes.some((prime) => rest % BigInt(prime) === 0n)) refuseRequest('csr.rsa.factor')
  if (isRoca(n.content)) refuseRequest('csr.rsa.roca')
  if (hasClosePrimes(modulus)) refuseRequest('csr.rsa.close-primes')
  if (bits < 3072) refuseRequest('csr.rsa.short', `RSA-${bits}`)
  return refuseRequest('csr.rsa.not-admitted', `RSA-${bits}`)
}
